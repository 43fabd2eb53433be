"""What people look at: backtests and reports."""
