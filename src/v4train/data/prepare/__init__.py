"""From files as people have them to a token store: parallel, resumable, and the same bytes however it was run."""
