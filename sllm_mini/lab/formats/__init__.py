"""Three file formats side by side: what is in them, what it costs to read them, what damage they notice (chapter 01)."""
