"""What a data set is: cases from folders, lists and descriptions, and how they are split."""
