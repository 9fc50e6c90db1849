"""Changes to MXNet's own Python: each module has one, which ``startup`` installs."""
