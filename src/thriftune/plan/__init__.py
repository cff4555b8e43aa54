"""What a run would take before anything is spent: memory, time and dollars, and which method to take. No torch."""
