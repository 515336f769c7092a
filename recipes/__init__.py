"""One method, one file. Each module holds the method's recipe class, its rules and its `SETTINGS`."""
