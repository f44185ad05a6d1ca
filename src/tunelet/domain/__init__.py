"""Your own domain as an exam: documents, questions, people's answers, a data set and its task. Offline."""
