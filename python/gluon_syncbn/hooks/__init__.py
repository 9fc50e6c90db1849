"""What this package changes in MXNet's own Python: each module installs one change, at import."""
