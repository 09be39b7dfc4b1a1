package hub

import "github.com/meshpresence/mesh/internal/wire"

// numbers are the numbers of a room as its subscribers know them. Each join and leave
// that is delivered changes them by one, so that counts run from one update to the next.
// Except during the delivery of a repair they are those of the members.
type numbers struct {
	connections int
	counted     bool           // users are counted; if not, the fields below stay empty
	alone       int            // connections without a user; each counts as one
	of          map[string]int // user -> connections, at least 1
}

// numbersOf counts a list of members.
func numbersOf(list []*Member, counted bool) numbers {
	n := numbers{counted: counted}
	if !counted {
		n.connections = len(list)
		return n
	}
	for _, m := range list {
		n.add(m.User)
	}
	return n
}

// add counts a connection of a user ("": none).
func (n *numbers) add(user string) {
	n.connections++
	switch {
	case !n.counted:
	case user == "":
		n.alone++
	default:
		if n.of == nil {
			n.of = make(map[string]int)
		}
		n.of[user]++
	}
}

// remove is the inverse of add.
func (n *numbers) remove(user string) {
	n.connections--
	switch {
	case !n.counted:
	case user == "":
		n.alone--
	case n.of[user] > 1:
		n.of[user]--
	default:
		delete(n.of, user)
	}
}

// users returns the number of users.
func (n *numbers) users() int { return n.alone + len(n.of) }

// shown returns the numbers in the form that clients get.
func (n *numbers) shown() wire.Numbers {
	shown := wire.Numbers{Connections: wire.CountOf(n.connections)}
	if n.counted {
		shown.Users = wire.CountOf(n.users())
	}
	return shown
}
