"""What all our HTML pages share: the document around a page, its style, tables, ticks and numbers in words."""
