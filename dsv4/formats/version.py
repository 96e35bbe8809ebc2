"""The tool's version: part of a store's identity, so that another version does not resume it."""

VERSION = "0.1.0"
TOOL = f"dsv4 {VERSION}"
