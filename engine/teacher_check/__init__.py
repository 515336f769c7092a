"""The check of a teacher before days are spent on students: what it knows, how sure it is, what moves it."""
