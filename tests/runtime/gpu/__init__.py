"""The GPU runtime without a GPU: its plan run by the operations' references."""
