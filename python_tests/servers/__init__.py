"""Other people's servers, run for real in environments of their own: `make test-servers`."""
