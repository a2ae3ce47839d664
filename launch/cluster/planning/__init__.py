"""What a submission consists of, before anything is submitted: its runs, checked."""
