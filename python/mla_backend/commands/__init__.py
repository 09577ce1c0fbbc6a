"""What each command does. Heavy imports stay inside functions: ``--help`` must be quick."""
