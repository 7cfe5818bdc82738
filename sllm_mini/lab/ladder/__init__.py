"""The ladder of loaders, reads and pages one by one, and the pipeline drawn and predicted (chapter 02)."""
