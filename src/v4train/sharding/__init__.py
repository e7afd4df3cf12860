"""The device mesh, and the rules that split logical axes over it."""
