package peer

// Person returns the metadata of connections.
func Person() any { return person }
