package wire

import "strconv"

// Count is a number that may be missing. The zero Count is missing.
type Count struct{ next int } // the number plus one

// CountOf returns the Count of a number that is not negative.
func CountOf(n int) Count { return Count{n + 1} }

// Get returns the number. If it is missing, Get returns 0 and false.
func (c Count) Get() (n int, ok bool) { return max(c.next-1, 0), c.next > 0 }

// append appends the number as a further field of an object, unless it is missing. name
// is the text before it: a comma, the quoted name and a colon.
func (c Count) append(dst []byte, name string) []byte {
	if n, ok := c.Get(); ok {
		dst = strconv.AppendInt(append(dst, name...), int64(n), 10)
	}
	return dst
}

// Numbers are the numbers of connections and of users in a room. Users is missing if users
// are not counted. A connection without a user counts as one user.
type Numbers struct{ Connections, Users Count }

// append appends the numbers as further fields of an object.
func (n Numbers) append(dst []byte) []byte {
	return n.Users.append(n.Connections.append(dst, `,"connections":`), `,"users":`)
}

// appendPosition appends the position of a room as further fields of an object, unless
// epoch is empty.
func appendPosition(dst []byte, epoch string, seq uint64) []byte {
	if epoch == "" {
		return dst
	}
	dst = strconv.AppendUint(append(dst, `,"seq":`...), seq, 10)
	return appendString(append(dst, `,"epoch":`...), epoch)
}
