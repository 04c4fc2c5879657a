"""The vocabulary: patterns, selection and budgets, masks, schedules. Imports torch alone."""
