"""`make gpu-report`: everything this project wants to know of a machine with a CUDA GPU, in stages that can be resumed.

`plan` is the table of stages and units, `runner` runs it within a budget, `summary` and `archive` put what was recorded
into one small file, and `record` brings that file's results into `data/results/`, and if asked its
chapters into `chapters/`. The runner itself needs Python alone, so that it can say of any interpreter what is missing
there.
"""
