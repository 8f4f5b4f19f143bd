"""Labels as people have them: words that name a class, and tables of labels."""
