"""What chapters need: measuring, the look they share, widgets and exercises. Imported by nothing but the command line."""
