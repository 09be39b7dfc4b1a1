package meshdebug

import (
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/meshpresence/mesh"
)

// page is all data of a page, for HTML and for JSON.
type page struct {
	View  string    `json:"view"`
	Time  time.Time `json:"time"` // by this machine's clock
	Ready bool      `json:"ready"`
	// NotReady says why the server does not accept connections.
	NotReady string          `json:"notReady,omitempty"`
	Servers  *serversPart    `json:"servers,omitempty"`
	Conn     *connectionPart `json:"connection,omitempty"`
	Room     *roomPart       `json:"room,omitempty"`
	Rooms    *roomsPart      `json:"rooms,omitempty"`
	Watched  *watchedPart    `json:"watched,omitempty"`
	Stats    stats           `json:"stats,omitempty"`

	query query
}

// part holds the fields that every part has.
type part struct {
	Error string `json:"error,omitempty"` // why the part is incomplete

	err error
}

type serversPart struct {
	part
	List []server `json:"list"`
}

type server struct {
	Incarnation string  `json:"incarnation"`
	Name        string  `json:"name,omitempty"`
	Self        bool    `json:"self"`
	State       string  `json:"state"`
	LeaseLeft   seconds `json:"leaseLeftSeconds"`
	LeaseAge    seconds `json:"leaseAgeSeconds"`
	DeadFor     seconds `json:"deadForSeconds"`
	Owned       int     `json:"owned"`
}

type roomsPart struct {
	part
	Total  int    `json:"total"`
	Prefix string `json:"prefix"`
	List   []room `json:"list"`
	Next   string `json:"next"`
}

type room struct {
	Name    string `json:"name"`
	Members int    `json:"members"`
	Tracked bool   `json:"tracked"`
}

type watchedPart struct {
	part
	Total  int       `json:"total"`
	Prefix string    `json:"prefix"`
	Stale  bool      `json:"stale"`
	List   []watched `json:"list"`
	Next   string    `json:"next"`
}

type watched struct {
	Name          string  `json:"name"`
	Subscriptions int     `json:"subscriptions"`
	Members       int     `json:"members"`
	Stale         bool    `json:"stale"`
	Epoch         string  `json:"epoch"`
	Seq           uint64  `json:"seq"`
	RedisEpoch    string  `json:"redisEpoch"`
	RedisSeq      uint64  `json:"redisSeq"`
	Behind        *uint64 `json:"behind"`
}

type roomPart struct {
	part
	Name    string    `json:"name"`
	Epoch   string    `json:"epoch"`
	Seq     uint64    `json:"seq"`
	Total   int       `json:"total"`
	Now     time.Time `json:"now,omitzero"` // by Redis's clock
	Hidden  bool      `json:"hidden"`
	Entries []entry   `json:"entries"`
	Next    string    `json:"next"`
	Users   int       `json:"users,omitempty"` // 0: not known, or there are no users
	User    string    `json:"user,omitempty"`  // of the search; empty: no search
}

type entry struct {
	ConnectionID string          `json:"connectionId"`
	UserID       string          `json:"userId,omitempty"`
	KeptUntil    *time.Time      `json:"keptUntil,omitempty"` // of a disconnected entry
	ID           string          `json:"id"`
	Server       string          `json:"server"`
	ServerName   string          `json:"serverName,omitempty"`
	ServerState  string          `json:"serverState,omitempty"`
	Self         bool            `json:"self"`
	JoinedAt     time.Time       `json:"joinedAt"`
	TTL          seconds         `json:"ttlSeconds"`
	Seq          uint64          `json:"seq"`
	Metadata     json.RawMessage `json:"metadata,omitempty"`
	State        json.RawMessage `json:"state,omitempty"`
	StateSilent  bool            `json:"stateSilent,omitempty"`
	StateUntil   *time.Time      `json:"stateUntil,omitempty"`
}

// seconds is a duration that is a number of seconds in JSON.
type seconds time.Duration

// MarshalJSON implements json.Marshaler.
func (s seconds) MarshalJSON() ([]byte, error) {
	return json.Marshal(float64(time.Duration(s).Microseconds()) / 1e6)
}

// status is 200, 400 if the query was invalid, 404 if no server has the connection, or
// 503 if a part could not be read.
func (p *page) status() int {
	status := http.StatusOK
	for _, err := range p.errors() {
		switch {
		case errors.Is(err, mesh.ErrInvalidRoom), errors.Is(err, mesh.ErrInvalidOptions),
			errors.Is(err, mesh.ErrInvalidConnectionID):
			return http.StatusBadRequest
		case errors.Is(err, mesh.ErrUnknownConnection):
			return http.StatusNotFound
		case err != nil:
			status = http.StatusServiceUnavailable
		}
	}
	return status
}

func (p *page) errors() (errs []error) {
	if p.Servers != nil {
		errs = append(errs, p.Servers.err)
	}
	if p.Conn != nil {
		errs = append(errs, p.Conn.err)
	}
	if p.Room != nil {
		errs = append(errs, p.Room.err)
	}
	if p.Rooms != nil {
		errs = append(errs, p.Rooms.err)
	}
	if p.Watched != nil {
		errs = append(errs, p.Watched.err)
	}
	return errs
}

func failed(err error) part {
	if err == nil {
		return part{}
	}
	return part{Error: err.Error(), err: err}
}
