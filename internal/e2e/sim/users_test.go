package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/testhook"
)

// The rule of cap rooms.
const simMaxConnections, simMaxUsers = 4, 2

// simUsers is the part of a run with users. Its connections and rooms are its own, and
// so is its random source. The rest of a seed is the same without it.
type simUsers struct {
	s     *sim
	rng   *rand.Rand
	grace time.Duration
	rooms []string

	// Guarded by sim.mu.
	conns   []*simUserConn
	streams map[string]*simUserStream
	born    int
	loose   map[string]bool // rooms that lost a key and have not been right since
	ended   map[simUser]time.Time
	moved   map[string]bool // connections and rooms with a change of user
}

// simUser identifies a user in a room.
type simUser struct{ room, user string }

// simUserConn is a connection of a user.
type simUserConn struct {
	id, user, room string
	server         *simServer
	busy, gone     bool
	acked          time.Time // when its last join succeeded; zero if it has not
}

func newSimUsers(s *sim) *simUsers {
	rng := rand.New(rand.NewPCG(uint64(s.seed), 21))
	return &simUsers{
		s: s, rng: rng, grace: time.Duration(1000+rng.IntN(4000)) * time.Millisecond, rooms: []string{"grace0", "grace1", "cap0"},
		streams: map[string]*simUserStream{}, loose: map[string]bool{}, ended: map[simUser]time.Time{}, moved: map[string]bool{},
	}
}

// track sets the rules of the rooms with users.
func (u *simUsers) track(p *mesh.PresenceManager) {
	for pattern, rule := range map[string]mesh.PresenceOptions{
		"^grace": {Grace: u.grace},
		"^cap":   {Grace: u.grace, MaxConnections: simMaxConnections, MaxUsers: simMaxUsers},
	} {
		if err := p.TrackPresence(mesh.Regexp(regexp.MustCompile(pattern)), rule); err != nil {
			panic(err)
		}
	}
}

// lost notes that keys of rooms were deleted. s.mu is held.
func (u *simUsers) lost() {
	for _, room := range u.rooms {
		u.loose[room] = true
	}
}

// open returns the connections that can act. s.mu is held.
func (u *simUsers) open() []*simUserConn {
	u.conns = slices.DeleteFunc(u.conns, func(c *simUserConn) bool { return c.gone || c.server.dead })
	return slices.DeleteFunc(slices.Clone(u.conns), func(c *simUserConn) bool { return c.busy || c.server.paused })
}

// act lets one connection or administrator do something.
func (u *simUsers) act() {
	s := u.s
	s.mu.Lock()
	defer s.mu.Unlock()
	servers := slices.DeleteFunc(s.running(), func(n *simServer) bool { return n.idle })
	dice := u.rng.IntN(100)
	if dice >= 40 || len(servers) == 0 {
		return
	}
	n, room := servers[u.rng.IntN(len(servers))], u.rooms[u.rng.IntN(len(u.rooms))]
	user := [...]string{"ann", "bob", "eve", ""}[u.rng.IntN(4)]
	u.watch(n, room)
	list := u.open()
	if len(list) == 0 || dice < 8 && len(u.conns) < 12 {
		u.enter(&simUserConn{user: user, room: room, server: n}, "", 0)
		return
	}
	c := list[u.rng.IntN(len(list))]
	switch {
	case dice < 22: // a reload
		c.gone = true
		if !c.acked.IsZero() { // otherwise it may not be in the room
			u.ended[simUser{c.room, c.user}] = time.Now()
		}
		u.call(c, "ends", func(ctx context.Context) error { return c.server.p.Disconnect(ctx, c.id) })
		next := &simUserConn{user: c.user, room: c.room, server: n}
		if u.rng.IntN(4) == 0 { // the app's transport keeps the id
			next.id = c.id
		}
		u.enter(next, c.id, time.Duration(u.rng.Int64N(int64(2*u.grace))))
	case dice < 26: // a return while the old socket is half open
		u.enter(&simUserConn{user: c.user, room: c.room, server: n}, c.id, 0)
	case dice < 30:
		c.gone = true
		u.call(c, "leaves", func(ctx context.Context) error {
			if _, err := c.server.p.Leave(ctx, c.room, c.id); err != nil {
				return err
			}
			return c.server.p.Disconnect(ctx, c.id)
		})
	case dice < 33:
		s.noted("%s gets the user %q", c.id, user)
		c.busy, c.acked, u.moved[c.id], u.moved[c.room] = true, time.Time{}, true, true
		s.calls.Go(func() {
			_ = n.p.Connections().SetMetadata(s.ctx, c.id, map[string]string{"userId": user}, mesh.MetadataOptions{})
			s.mu.Lock()
			defer s.mu.Unlock()
			c.busy, c.user = false, user
		})
	case dice < 36:
		u.forgetAcks(room)
		u.call(c, "is there while "+user+" is removed from "+room, func(ctx context.Context) error {
			if user == "" {
				return n.p.Rooms().Clear(ctx, room)
			}
			_, err := n.p.Rooms().RemoveUser(ctx, room, user)
			return err
		})
	case dice < 38:
		u.forgetAcks(c.room)
		u.call(c, "is removed", func(ctx context.Context) error {
			_, err := n.p.Rooms().Remove(ctx, c.room, c.id)
			return err
		})
	default:
		u.call(c, "publishes a state", func(ctx context.Context) error {
			return c.server.p.PublishState(ctx, c.room, c.id, map[string]int{"n": dice}, mesh.StateOptions{})
		})
	}
}

// forgetAcks notes that connections of a room may be removed from now on. s.mu is held.
func (u *simUsers) forgetAcks(room string) {
	for _, c := range u.conns {
		if c.room == room {
			c.acked = time.Time{}
		}
	}
}

// call runs a call in the background. A fault may make it fail. s.mu is held.
func (u *simUsers) call(c *simUserConn, what string, f func(ctx context.Context) error) {
	c.busy = true
	u.s.noted("%s of %q in %s on %s %s", c.id, c.user, c.room, c.server.name, what)
	u.s.calls.Go(func() {
		err := f(u.s.ctx)
		u.s.mu.Lock()
		defer u.s.mu.Unlock()
		c.busy = false
		if err != nil {
			u.s.noted("%s %s: %v", c.id, what, err)
		}
	})
}

// enter lets a connection join after some time. s.mu is held.
func (u *simUsers) enter(c *simUserConn, before string, after time.Duration) {
	if c.id == "" {
		u.born++
		c.id = fmt.Sprintf("u%03d", u.born)
	}
	u.conns = append(u.conns, c)
	replaces := before != "" && before != c.id && u.rng.IntN(2) == 0
	u.call(c, fmt.Sprintf("joins %v after %q, replaces %v", after.Round(time.Millisecond), before, replaces), func(ctx context.Context) error {
		select {
		case <-time.After(after):
		case <-u.s.over:
			return nil
		}
		if err := c.server.p.Connect(ctx, c.id, map[string]string{"userId": c.user}); err != nil {
			return err
		}
		if err := u.join(ctx, c, before, replaces); err != nil {
			return err
		}
		u.s.mu.Lock()
		defer u.s.mu.Unlock()
		c.acked = time.Now()
		return nil
	})
}

// join joins like an app, or like a socket that names its last connection.
func (u *simUsers) join(ctx context.Context, c *simUserConn, before string, replaces bool) error {
	if !replaces {
		return c.server.p.Join(ctx, c.room, c.id)
	}
	own, ok := testhook.PartsOf(c.server.p).Local.Conn(c.id)
	if !ok {
		return mesh.ErrUnknownConnection
	}
	u.s.mu.Lock()
	for _, o := range u.conns {
		if o.id == before && o.room == c.room { // its entry may end now
			o.acked = time.Time{}
		}
	}
	u.s.mu.Unlock()
	_, err := testhook.JoinInPlaceOf(ctx, c.server.p, own, c.room, before)
	return err
}

// leave removes everybody at the end of a run, so that no key may be left. s.mu is
// held.
func (u *simUsers) leave() {
	for _, st := range u.streams {
		st.over = true
		st.cancel()
	}
	servers := u.s.running()
	for _, c := range u.open() {
		c.gone = true
		u.call(c, "leaves at the end", func(ctx context.Context) error { return c.server.p.Disconnect(ctx, c.id) })
	}
	for _, room := range u.rooms {
		u.s.calls.Go(func() {
			time.Sleep(time.Second)
			if err := servers[0].p.Rooms().Clear(u.s.ctx, room); err != nil {
				u.s.note("clear %s: %v", room, err)
			}
		})
	}
}

// simRecord is the part of a record in Redis that says whose it is.
type simRecord struct {
	user  string
	until time.Time // of a kept place; zero for a live entry
}

func parseSimRecord(v string) (simRecord, bool) {
	head, body, _ := strings.Cut(v, "\n")
	f := strings.Fields(head)
	if len(f) < 11 {
		return simRecord{}, false
	}
	var r simRecord
	if len(f) >= 14 {
		n, err := strconv.Atoi(f[11])
		if err != nil || n > len(body) {
			return r, false
		}
		r.user = body[:n]
	}
	if f[1] == "~" {
		if len(f) < 16 {
			return r, false
		}
		ms, err := strconv.ParseInt(f[14], 10, 64)
		if err != nil {
			return r, false
		}
		r.until = time.UnixMilli(ms)
	}
	return r, true
}

// check compares the keys of each room in Redis, as of one moment. s.mu is held.
func (u *simUsers) check(now time.Time) {
	for _, room := range u.rooms {
		wrong := u.wrong(room, now)
		switch {
		case wrong == "":
			u.loose[room] = false
		case !u.loose[room]:
			u.s.fail("Redis, %s: %s", room, wrong)
		}
	}
}

// wrong returns what does not agree in the keys of a room.
func (u *simUsers) wrong(room string, now time.Time) string {
	s := u.s
	tx := s.admin.TxPipeline()
	position, records := tx.Get(s.ctx, "mesh:presence:seq:"+room), tx.HGetAll(s.ctx, "mesh:presence:members:"+room)
	hash, kept := tx.HGetAll(s.ctx, "mesh:presence:users:"+room), tx.ZRange(s.ctx, "mesh:presence:kept", 0, -1)
	_, _ = tx.Exec(s.ctx)
	index := strings.Join(kept.Val(), "\n") + "\n"
	live, places, users := map[string]int{}, map[string]string{}, map[string]bool{}
	alone, calm := 0, s.active == 0 && now.After(s.disturbed)
	for conn, v := range records.Val() {
		r, ok := parseSimRecord(v)
		if !ok {
			return fmt.Sprintf("the record of %s is %q", conn, v)
		}
		switch {
		case r.user == "":
			alone++
		case r.until.IsZero():
			live[r.user]++
		case places[r.user] != "":
			return fmt.Sprintf("%s has two kept places, %s and %s", r.user, places[r.user], conn)
		default:
			places[r.user] = conn
		}
		users[r.user] = true
		if r.until.IsZero() {
			continue
		}
		s.counts["kept places"]++
		entry, _, _ := strings.Cut(v, " ")
		if !strings.Contains(index, "e "+conn+" "+entry+" "+room+"\n") {
			return fmt.Sprintf("the place of %s is not in the index", conn)
		}
		if late := now.Add(s.ahead).Sub(r.until); calm && late > s.lease+2*time.Second {
			return fmt.Sprintf("the place of %s is kept for %v too long", conn, late)
		}
	}
	delete(users, "")
	if strings.HasPrefix(room, "cap") && u.capsHold() {
		if n := len(records.Val()); n > simMaxConnections {
			return fmt.Sprintf("%d connections are over the cap", n)
		}
		if n := len(users) + alone; n > simMaxUsers && !u.moved[room] {
			return fmt.Sprintf("%d users are over the cap", n)
		}
	}
	f := strings.Fields(position.Val())
	if len(f) < 5 || f[3] != "*" || strings.HasPrefix(f[4], "?") {
		return "" // no users, or they are counted again
	}
	heads := len(users) + alone
	// After a rebuild, "/" and its end follow.
	if number, _, _ := strings.Cut(f[4], "/"); number != strconv.Itoa(heads) && len(records.Val()) > 0 {
		return fmt.Sprintf("the position %q should have %d users", position.Val(), heads)
	}
	h := hash.Val()
	if len(records.Val()) > 0 && h[""] != strconv.Itoa(len(records.Val())) {
		return fmt.Sprintf("%s entries are counted, not %d", h[""], len(records.Val()))
	}
	for user := range users {
		want := strconv.Itoa(live[user])
		if place := places[user]; place != "" {
			if live[user] > 0 {
				return fmt.Sprintf("%s has %d live connections and the kept place %s", user, live[user], place)
			}
			want = "~" + place
		}
		if h[user] != want {
			return fmt.Sprintf("the hash has %q for %s, not %q", h[user], user, want)
		}
	}
	if len(h) > 0 && len(h) != len(users)+1 {
		return fmt.Sprintf("the hash has %d fields for %d users", len(h), len(users))
	}
	return ""
}

// capsHold reports whether no fault so far can have made a server write entries again,
// which may exceed a cap.
func (u *simUsers) capsHold() bool {
	return !slices.ContainsFunc(simFaultList(), func(f simFault) bool { return !f.calm && u.s.injected[f.name] > 0 })
}

// simUserStream is a subscription to a room with users.
type simUserStream struct {
	room   string
	server *simServer
	cancel context.CancelFunc
	over   bool
	users  map[string]string // user by connection
	away   map[string]bool   // disconnected members
	states map[string]bool   // members with a state
}

// watch subscribes to a room that has no subscription. s.mu is held.
func (u *simUsers) watch(n *simServer, room string) {
	if st := u.streams[room]; st != nil && !st.over && !st.server.dead {
		return
	}
	ctx, cancel := context.WithCancel(u.s.ctx)
	st := &simUserStream{room: room, server: n, cancel: cancel, users: map[string]string{}, away: map[string]bool{}, states: map[string]bool{}}
	if old := u.streams[room]; old != nil {
		old.cancel()
	}
	u.streams[room] = st
	u.s.calls.Go(func() {
		for ev, err := range n.p.Subscribe(ctx, room, mesh.SubscribeOptions{}) {
			u.s.mu.Lock()
			if err == nil && !st.over && !n.dead {
				u.take(st, ev)
			}
			u.s.mu.Unlock()
			if err != nil {
				break
			}
		}
		u.s.mu.Lock()
		defer u.s.mu.Unlock()
		st.over = true
	})
}

// take checks the next update of a stream. s.mu is held.
func (u *simUsers) take(st *simUserStream, ev mesh.Event) {
	line := fmt.Sprintf("%s on %s: %s %s user %q %d of %d, %d users, %s", st.room, st.server.name, ev.Type, ev.ConnectionID, ev.UserID, ev.UserConnections, ev.Connections, ev.Users, ev.Reason)
	if *simLog {
		u.s.noted("    received %s", line)
	}
	_, present := st.users[ev.ConnectionID]
	switch ev.Type {
	case mesh.EventSnapshot:
		for _, m := range ev.Snapshot.Members {
			st.users[m.ID] = m.UserID
			if m.Disconnected {
				st.away[m.ID] = true
			}
			if m.State != nil {
				st.states[m.ID] = true
			}
		}
		return
	case mesh.EventJoin:
		if present {
			u.s.fail("join of a member: %s", line)
		}
		st.users[ev.ConnectionID] = ev.UserID
	case mesh.EventLeave:
		if !present {
			u.s.fail("leave of an absent connection: %s", line)
		}
		delete(st.users, ev.ConnectionID)
		delete(st.away, ev.ConnectionID)
		delete(st.states, ev.ConnectionID)
	case mesh.EventState:
		if st.states[ev.ConnectionID] = ev.State != nil; ev.State != nil && st.away[ev.ConnectionID] {
			u.s.fail("state of a kept place: %s", line)
		}
		return
	case mesh.EventDisconnect:
		if !present || st.away[ev.ConnectionID] || st.states[ev.ConnectionID] {
			u.s.fail("present %v, away %v, with a state %v: %s", present, st.away[ev.ConnectionID], st.states[ev.ConnectionID], line)
		}
		st.away[ev.ConnectionID] = true
	case mesh.EventMetadata, mesh.EventReconnect: // may be of another user
		if !present {
			u.s.fail("%s of an absent connection: %s", ev.Type, line)
		}
		if ev.Type == mesh.EventReconnect {
			if !st.away[ev.ConnectionID] {
				u.s.fail("reconnect of a member that is connected: %s", line)
			}
			delete(st.away, ev.ConnectionID)
		}
		st.users[ev.ConnectionID] = ev.UserID
	default:
		return
	}
	u.s.counts["user "+string(ev.Type)]++
	connections, users := 0, map[string]bool{}
	for conn, user := range st.users {
		if user == "" {
			users["\n"+conn] = true
			continue
		}
		users[user] = true
		if user == ev.UserID {
			connections++
		}
	}
	if ev.UserID != "" && ev.UserConnections != connections || ev.Connections != len(st.users) || ev.Users != len(users) {
		u.s.fail("should be %d of %d, %d users: %s", connections, len(st.users), len(users), line)
	}
	if ev.UserLeft() {
		u.left(st, ev, line)
	}
}

// compare checks that the streams tell of the members that Redis has, when no fault is
// left. A change may be under way, so it looks again for some time. s.mu is held.
func (u *simUsers) compare() {
	for _, st := range u.streams {
		if st.over || st.server.dead {
			continue
		}
		diff := ""
		for range 100 {
			var members []mesh.Member
			var err error
			u.s.unlocked(func() {
				time.Sleep(100 * time.Millisecond)
				members, err = st.server.p.Members(u.s.ctx, st.room)
			})
			if err != nil {
				diff = err.Error()
			} else if diff = st.differs(members); diff == "" {
				break
			}
		}
		if diff != "" {
			u.s.fail("the stream of %s on %s: %s", st.room, st.server.name, diff)
		}
	}
}

// differs returns how the members of the stream differ from those in Redis.
func (st *simUserStream) differs(members []mesh.Member) string {
	for _, m := range members {
		user, present := st.users[m.ID]
		if !present || user != m.UserID || st.away[m.ID] != m.Disconnected || st.states[m.ID] != (m.State != nil) {
			return fmt.Sprintf("%s is present %v, of %q, away %v, with a state %v; in Redis of %q, away %v, with a state %v",
				m.ID, present, user, st.away[m.ID], st.states[m.ID], m.UserID, m.Disconnected, m.State != nil)
		}
	}
	if len(st.users) != len(members) {
		return fmt.Sprintf("%d members, %d in Redis", len(st.users), len(members))
	}
	return ""
}

// left checks that a user who is reported as left is not there, and has had time to
// return.
func (u *simUsers) left(st *simUserStream, ev mesh.Event, line string) {
	now := time.Now()
	if u.s.active > 0 || now.Before(u.s.disturbed) {
		return
	}
	for _, c := range u.conns {
		if c.room == st.room && c.user == ev.UserID && !c.gone && !c.busy && !c.server.dead && !c.acked.IsZero() && now.Sub(c.acked) > 1500*time.Millisecond {
			u.s.fail("%s is back since %v: %s", c.id, c.acked.Sub(u.s.start), line)
		}
	}
	at := u.ended[simUser{st.room, ev.UserID}]
	if !u.moved[ev.ConnectionID] && (ev.Reason == mesh.ReasonClosed || ev.Reason == mesh.ReasonLost) && now.Sub(at) < u.grace-100*time.Millisecond {
		u.s.fail("left %v after its end: %s", now.Sub(at), line)
	}
}
