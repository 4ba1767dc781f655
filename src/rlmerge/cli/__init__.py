"""The command line: one thin module a command, which parses, calls the API and prints. Nobody imports it."""
