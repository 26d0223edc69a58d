"""What has nothing to do with models: errors, files, the host's settings, ranks that meet and watch each other."""
