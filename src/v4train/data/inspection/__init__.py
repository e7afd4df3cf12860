"""What a batch holds, in words, pictures and sound; and figures of a mixture."""
