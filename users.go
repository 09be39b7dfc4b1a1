package mesh

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/kept"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/peers"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/userid"
	"github.com/meshpresence/mesh/internal/wait"
	"github.com/meshpresence/mesh/internal/wire"
)

// unusableUser stands for a field of the metadata that holds no user id. It is no valid
// id, so that the connection has no user, and the case is counted.
const unusableUser = "\x00"

// UserIDField returns a function for Options.UserID that reads a top-level field of the
// metadata. The value must be a string, or an integer, which is used with its digits as
// they are written: 7 and "7" are the same user. The name of the field counts exactly,
// with upper and lower case.
//
// If the metadata are no object or the field is missing or null, the connection has no
// user. The same holds if the field occurs twice or has another value, or an id that is
// not valid (see Options.UserID). These cases are counted in Stats.InvalidUserIDs, and
// the function then returns a text that is no valid id.
func UserIDField(name string) func(Member) string {
	return func(m Member) string {
		id, found := userid.Field(m.Metadata, name)
		if id == "" && found {
			return unusableUser
		}
		return id
	}
}

// users are the part of a core that knows the users of connections. It is safe for
// concurrent use.
type users struct {
	of      func(Member) string // Options.UserID; nil: there are no users
	log     *limit.Log
	invalid atomic.Uint64 // ids that were not valid
	places  *kept.PerUser // limits the kept places of each
}

// userOf returns the user of a connection with these metadata, or "" for none. An invalid
// id counts as none, and so does a panic of the app's function.
func (u *users) userOf(conn string, metadata []byte) (id string) {
	const line = "mesh: no user, because Options.UserID returned no valid id"
	if u.of == nil {
		return ""
	}
	defer func() {
		if value := recover(); value != nil {
			u.invalid.Add(1)
			u.log.As(slog.LevelError, line, "mesh: no user, because Options.UserID panicked", "conn", conn, "panic", limit.PanicText(value))
			id = ""
		}
	}()
	id = u.of(Member{ID: conn, Metadata: json.RawMessage(metadata)})
	if id == "" || userid.Valid(id) {
		return id
	}
	u.invalid.Add(1)
	u.log.Warn(line, "conn", conn, "bytes", len(id))
	return ""
}

// User is a user in a room, with the connections there.
type User struct {
	// ID is empty for a connection without a user.
	ID string
	// Members are the connections of the user in the room, including a disconnected one,
	// sorted by their ids.
	Members []Member
}

// groupByUser groups members by user, in the order of PresenceManager.Users.
func groupByUser(members []Member) []User {
	slices.SortFunc(members, func(a, b Member) int {
		return cmp.Or(strings.Compare(a.UserID, b.UserID), strings.Compare(a.ID, b.ID))
	})
	var users []User
	for i, m := range members {
		if m.UserID == "" || i == 0 || members[i-1].UserID != m.UserID {
			users = append(users, User{ID: m.UserID})
		}
		last := &users[len(users)-1]
		last.Members = append(last.Members, m)
	}
	return users
}

// hasUsers reports whether connections belong to users, so that rooms can keep places.
func (n *core) hasUsers() bool { return n.opts.UserID != nil }

// checkUsers returns an error if there are no users.
func (n *core) checkUsers() error {
	if !n.hasUsers() {
		return fmt.Errorf("%w: Options.UserID is not set", ErrUsersOff)
	}
	return nil
}

// checkUser returns an error if there are no users, or if a user id is invalid.
func (n *core) checkUser(user string) error {
	if err := n.checkUsers(); err != nil {
		return err
	}
	if !userid.Valid(user) {
		return fmt.Errorf("%w: %.40q, must be UTF-8 of 1 to %d bytes without control characters", ErrInvalidUser, user, userid.MaxBytes)
	}
	return nil
}

// capsOf returns the caps of a room.
func (n *core) capsOf(room string) (connections, users int) {
	r := n.access.rules.Match(room)
	return r.MaxConnections, r.MaxUsers
}

// join brings a connection into a room. If a join guard decides against it, the place that
// the room keeps for its user ends.
func (n *core) join(ctx context.Context, c *local.Conn, room string, req guards.Request) (local.Joined, error) {
	joined, err := n.access.joins.Join(ctx, c, room, req)
	// Only a guard that decides, and not one that failed, ends the place.
	if user := c.User(); err == ErrRefused && user != "" && n.access.rules.Match(room).Grace > 0 { //nolint:errorlint // the bare error
		n.life.work.Go(func() { n.removeKeptOf(n.life.running, room, user) })
	}
	return joined, err
}

// removeKeptOf ends the kept place of a user in a room. If Redis does not answer, the
// place ends with its time.
func (n *core) removeKeptOf(ctx context.Context, room, user string) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	place, ok, err := n.store.KeptOf(ctx, room, user)
	if err == nil && ok {
		_, err = n.store.RemoveKept(ctx, []store.EntryRef{place})
	}
	if err != nil {
		n.opts.Logger.Debug("mesh: the place of a refused user is still kept", "room", room, "error", err)
	}
}

// add brings a connection into a room for the app, and tells its socket.
func (n *core) add(ctx context.Context, c *local.Conn, room string, overCap bool) error {
	joined, err := n.access.joins.Add(ctx, c, room, overCap)
	if err == nil && !joined.Again {
		n.push(c.ID(), wire.PushRoomJoined, wire.RoomJoined{RoomName: room})
	}
	return err
}

// tellRoomLeft tells a socket that its connection is no longer in a room.
func (n *core) tellRoomLeft(conn, room, reason string) {
	n.push(conn, wire.PushRoomLeft, wire.RoomLeft{RoomName: room, Reason: reason})
}

// joinFull is called when a join that its client was told about found the room full.
func (n *core) joinFull(c *local.Conn, room string, _ store.Bound) {
	n.tellRoomLeft(c.ID(), room, wire.ReasonFull)
}

// placeKept is called when a room keeps the place of a connection of this server. If that
// is one place too many for the user, the oldest one ends.
func (n *core) placeKept(room, conn, entry, user string, until int64) {
	n.kept.Add(room, conn, entry, until)
	place := store.KeptPlace{EntryRef: store.EntryRef{Room: room, Conn: conn, Entry: entry}, Until: until}
	oldest, over := n.users.places.Add(user, place, n.now())
	if !over {
		return
	}
	n.life.work.Go(func() {
		ctx, cancel := context.WithTimeout(n.life.ctx, callLimit)
		defer cancel()
		_, _ = n.store.RemoveKept(ctx, []store.EntryRef{oldest.EntryRef}) // after an error it ends with its time
	})
}

// placeTaken is called when a join at a position took the place of a connection. The
// server of that connection, unless its place was kept, forgets the entry, and closes the
// socket: the client has another one.
func (n *core) placeTaken(room, conn, owner string, by *local.Conn, at store.Position) {
	switch {
	case owner == store.NoOwner || conn == by.ID():
	case owner == n.lease.Incarnation():
		if c, ok := n.local.Conn(conn); ok {
			n.life.work.Go(func() { n.closeReplaced(c) })
		}
	default:
		n.life.work.Go(func() {
			call := peers.Call{Op: peers.OpReplaced, Room: room, Conn: conn, Position: at.String()}
			if _, err := n.peers.Call(n.life.running, peers.At(owner), call); err != nil && !errors.Is(err, context.Canceled) {
				n.opts.Logger.Debug("mesh: a server was not told that a connection was replaced", "conn", conn, "room", room, "error", err)
			}
		})
	}
}

// closeReplaced closes the socket of a connection that another one has replaced. A
// connection of the app's own transport stays. c may be nil.
func (n *core) closeReplaced(c *local.Conn) {
	if c != nil && n.sockets.replaced != nil {
		n.sockets.replaced(c.ID())
	}
}

// userPasses is the number of times that RemoveUser looks for members of the user, as long
// as it finds some.
const userPasses = 3

// removeUser removes the present members of a user from a room.
func (n *core) removeUser(ctx context.Context, room, user string) (removed int, err error) {
	records, _, err := n.store.Some(ctx, room, -1)
	if err != nil {
		return 0, errorFor(ctx, err)
	}
	records = slices.DeleteFunc(records, func(r store.Record) bool { return r.User != user })
	for _, r := range records {
		if r.Kept() {
			continue
		}
		done, err := n.callOwner(ctx, peers.Call{Op: peers.OpRemove, Room: room, Conn: r.Conn})
		if done.OK {
			removed++
		}
		if errors.Is(err, ErrUnknownConnection) { // it has just ended
			done.OK, err = n.removeEnding(ctx, room, r.Conn, true)
			if done.OK {
				removed++
			}
		}
		if err != nil {
			return removed, errorFor(ctx, err)
		}
	}
	ended, err := n.store.RemoveKept(ctx, placesIn(room, records...))
	return removed + ended, errorFor(ctx, err)
}

const (
	// endingFor is the time for which a removal waits for the end of a connection to be
	// written, and endingStep the interval at which it looks.
	endingFor  = 500 * time.Millisecond
	endingStep = 20 * time.Millisecond
)

// removeEnding ends the kept place of a connection in a room, and reports whether there
// was one. ending says that the connection has ended. Then its server may still have to
// write that its place is kept, and removeEnding waits for it.
func (n *core) removeEnding(ctx context.Context, room, conn string, ending bool) (bool, error) {
	for began := time.Now(); ; {
		record, there, err := n.store.Record(ctx, room, conn)
		if err != nil || !there {
			return false, err
		}
		if record.Kept() {
			ended, err := n.store.RemoveKept(ctx, placesIn(room, record))
			return ended > 0, err
		}
		if !ending || time.Since(began) > endingFor {
			return false, nil
		}
		if err := wait.For(ctx, endingStep); err != nil {
			return false, err
		}
	}
}

// removeKeptIn ends all kept places of a room. Members that are left may be ending, so it
// looks once more after a moment.
func (n *core) removeKeptIn(ctx context.Context, room string) (removed int, err error) {
	for again := range 2 {
		records, _, err := n.store.Some(ctx, room, -1)
		if err != nil {
			return removed, errorFor(ctx, err)
		}
		places := placesIn(room, records...)
		ended, err := n.store.RemoveKept(ctx, places)
		removed += ended
		if err != nil || again > 0 || len(places) == len(records) {
			return removed, errorFor(ctx, err)
		}
		if err := wait.For(ctx, 5*endingStep); err != nil {
			return removed, errorFor(ctx, err)
		}
	}
	return removed, nil
}

// placesIn returns the kept places among the records of a room.
func placesIn(room string, records ...store.Record) (places []store.EntryRef) {
	for i := range records {
		if r := &records[i]; r.Kept() {
			places = append(places, store.EntryRef{Room: room, Conn: r.Conn, Entry: r.Entry})
		}
	}
	return places
}
