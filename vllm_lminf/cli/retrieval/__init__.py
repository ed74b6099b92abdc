"""Questions about long texts, asked of one kind of attention after the other, and their answers."""
