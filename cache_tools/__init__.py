"""The ``jitgemm`` command."""
