package keys

import "strings"

// Kind says what an expired key stood for.
type Kind byte

// The kinds of keys whose expiry ends something. Servers send these letters to each
// other.
const (
	ConnExpired  Kind = 'c' // the key Conn: an entry is over
	StateExpired Kind = 's' // the key State: a state is over
)

// Expired is the meaning of the name of an expired key.
type Expired struct {
	Kind Kind
	Room string
	Conn string
}

// ParseExpired is the inverse of Conn and State. All other names are not ok, and neither
// are those of other prefixes and buckets.
func (k Space) ParseExpired(key string) (e Expired, ok bool) {
	rest, ok := strings.CutPrefix(key, k.Prefix)
	if !ok {
		return Expired{}, false
	}
	if k.Cluster {
		if _, rest, ok = strings.Cut(rest, "}:"); !ok {
			return Expired{}, false
		}
	}
	if rest, ok = strings.CutPrefix(rest, "presence:"); !ok {
		return Expired{}, false
	}
	word, rest, _ := strings.Cut(rest, ":")
	build := k.Conn
	switch word {
	case "conn":
		e.Kind = ConnExpired
	case "state":
		e.Kind, build = StateExpired, k.State
	default:
		return Expired{}, false
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return Expired{}, false
	}
	e.Room, e.Conn = rest[:i], rest[i+1:]
	// Building the name again also checks the hash tag.
	if !validConnectionID(e.Conn) || build(e.Room, e.Conn) != key {
		return Expired{}, false
	}
	return e, true
}
