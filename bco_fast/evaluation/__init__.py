"""What a person looks at after training: completions, win rates, token shifts, reports."""
