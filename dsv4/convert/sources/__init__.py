"""Where a checkpoint's bytes come from: a directory or a hub repository, read range by range."""
