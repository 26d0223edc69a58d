"""What lab.analyze looks at, a module per command: `add_arguments` says what it takes, `run` returns what was found."""
