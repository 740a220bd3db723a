"""The command line `fewstep`: embedded models, sweeps, metrics and reports."""
