"""Everything HTTP: what a request's body asks for, receipts in answers, and the operator's side."""
