"""The command line `sllm-mini`. `main` puts it together; each command group is one module and imports what it needs
only when it runs, so that `sllm-mini --help` loads neither torch nor transformers."""
