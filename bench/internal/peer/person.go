package peer

// Person is the metadata that connections have.
func Person() any { return person }
