"""What every room may use: errors, statistics, nested values, references to user code."""
