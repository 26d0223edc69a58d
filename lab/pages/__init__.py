"""What is computed in README.md and docs/, a module per page."""
