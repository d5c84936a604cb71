"""What is made of a finished or running run for people: the report page, the model card, samples as text."""
