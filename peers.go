package mesh

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/peers"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// peersConfig returns the functions through which peers reach this server.
func (n *core) peersConfig() peers.Config {
	return peers.Config{
		Life: n.life.ctx, Incarnation: n.lease.Incarnation, Channel: n.keys.ServerChannel, Publish: n.store.Publish,
		Owners: n.store.OwnersIn, Servers: n.livingServers, Execute: n.execute, SetMetadata: n.metadataChanged,
		Deliver: n.deliverFrame, ToError: errorFor,
	}
}

// livingServers returns the incarnations that are not dead.
func (n *core) livingServers(ctx context.Context) ([]string, error) {
	leases, _, err := n.store.ServerLeases(ctx, maxServers)
	var living []string
	for _, one := range leases {
		if !one.Dead {
			living = append(living, one.Incarnation)
		}
	}
	return living, err
}

// metadataChanged takes in metadata that another server has changed.
func (n *core) metadataChanged(id string, version uint64, data []byte) {
	if conn, ok := n.local.Conn(id); ok {
		conn.SetMeta(version, data)
	}
}

// deliverFrame delivers a frame to sockets of this server.
func (n *core) deliverFrame(in peers.Frame) {
	if n.sockets.deliver == nil {
		return
	}
	f, err := wire.Push(in.Command, wire.Raw(in.Payload))
	if err != nil {
		return
	}
	if in.Room == "" {
		n.sockets.deliver(in.Conn, f)
		return
	}
	for _, conn := range n.local.InRoom(in.Room) {
		n.sockets.deliver(conn.ID(), f)
	}
}

// callOwner lets the server of call.Conn carry out a call.
func (n *core) callOwner(ctx context.Context, call peers.Call) (peers.Result, error) {
	return n.peers.Call(ctx, func(ctx context.Context) (string, error) { return n.locate(ctx, call.Conn) }, call)
}

// locate returns the incarnation that owns a connection.
func (n *core) locate(ctx context.Context, connID string) (string, error) {
	if err := n.checkRunningCtx(ctx); err != nil {
		return "", err
	}
	if err := keys.ValidateConnectionID(connID); err != nil {
		return "", err
	}
	if _, ok := n.local.Conn(connID); ok {
		return n.lease.Incarnation(), nil
	}
	value, err := n.store.ConnMeta(ctx, connID)
	if err != nil {
		return "", errorFor(ctx, err)
	}
	if value.Owner == "" || value.Owner == n.lease.Incarnation() {
		return "", fmt.Errorf("%w: %s", ErrUnknownConnection, connID)
	}
	return value.Owner, nil
}

// maxConfirmCalls limits the calls of ownerAsker that run at once. A skipped call is made
// again later.
const maxConfirmCalls = 16

// ownerAsker returns a function that asks another server which of its connections are no
// longer in a room, and passes these to gone. It does not block.
func (n *core) ownerAsker() func(room, owner string, conns []string, gone func([]string)) {
	slots := make(chan struct{}, maxConfirmCalls) // one per running call
	return func(room, owner string, conns []string, gone func([]string)) {
		select {
		case slots <- struct{}{}:
		default:
			return
		}
		n.life.work.Go(func() {
			defer func() { <-slots }()
			call := peers.Call{Op: peers.OpGone, Room: room, Conns: conns}
			if answer, err := n.peers.Call(n.life.running, peers.At(owner), call); err == nil {
				gone(answer.Gone)
			}
		})
	}
}

// execute carries out a call for this server's own connections.
func (n *core) execute(ctx context.Context, call peers.Call) (peers.Result, error) {
	switch call.Op {
	case peers.OpClear:
		return n.clear(ctx, call)
	case peers.OpRecheckRoom:
		n.access.RecheckRoom(call.Room)
		return peers.Result{OK: true}, nil
	case peers.OpGone:
		return peers.Result{OK: true, Gone: n.local.NotIn(call.Room, call.Conns)}, nil
	case peers.OpReplaced:
		at, err := store.ParsePosition(call.Position)
		if err == nil {
			n.closeReplaced(n.local.Forget(call.Room, call.Conn, at))
		}
		return peers.Result{OK: err == nil}, nil
	}
	conn, err := n.conn(call.Conn)
	if err != nil {
		return peers.Result{}, err
	}
	done := peers.Result{OK: true}
	switch call.Op {
	case peers.OpAdd:
		err = n.add(ctx, conn, call.Room, call.OverCap)
		done.OK = err == nil
		if full, ok := errors.AsType[fullError](err); ok {
			done.Full = fmt.Sprintf("%d %s", full.Max, full.Of)
		}
	case peers.OpRemove:
		if done.OK, err = n.access.Revoke(ctx, conn, call.Room); done.OK {
			n.tellRoomLeft(conn.ID(), call.Room, wire.ReasonRemoved)
		}
	case peers.OpRooms:
		done.Rooms = conn.Rooms()
	case peers.OpRecheck:
		n.access.Recheck(conn)
	case peers.OpClose:
		n.close(conn, departRemoved)
	default:
		return peers.Result{}, fmt.Errorf("%w: operation %q", ErrIncompatible, call.Op)
	}
	return done, errorFor(ctx, err)
}

const (
	// A call of OpClear that may do a part begins nothing more after clearFor, and fails
	// after clearWithin. That is shorter than callLimit, so that the answer still arrives.
	clearFor    = 500 * time.Millisecond
	clearWithin = 1300 * time.Millisecond
	// clearBatch is the number of connections that leave at once. They share a batch or
	// two.
	clearBatch = 256
)

// clear takes this server's connections out of a room, in the order of their ids, so that
// a connection that has joined again since is not taken out twice. It voids waiting joins
// and asks the guards again about the connections that see the room. It asks at the
// beginning, and once more at the end for guards that depend on the members.
func (n *core) clear(ctx context.Context, call peers.Call) (peers.Result, error) {
	again := func() { n.access.RecheckViewers(call.Room) }
	if call.After == "" {
		again()
		n.access.joins.TakeOutOf(call.Room)
	}
	conns := slices.DeleteFunc(n.local.Joined(call.Room), func(conn *local.Conn) bool { return conn.ID() <= call.After })
	slices.SortFunc(conns, func(a, b *local.Conn) int { return strings.Compare(a.ID(), b.ID()) })
	var done peers.Result
	began := time.Now()
	if call.Paged {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, clearWithin)
		defer cancel()
	}
	for part := range slices.Chunk(conns, clearBatch) {
		if call.Paged && done.After != "" && time.Since(began) > clearFor {
			return done, nil
		}
		left, err := n.clearPart(ctx, call.Room, part)
		done.Count += left
		done.OK = done.Count > 0
		if err != nil {
			return done, errorFor(ctx, err)
		}
		done.After = part[len(part)-1].ID()
	}
	done.After = ""
	if len(conns) > 0 || call.After != "" {
		again()
	}
	return done, nil
}

// clearPart takes connections out of a room, all at once, and returns the number of those
// that have left.
func (n *core) clearPart(ctx context.Context, room string, conns []*local.Conn) (left int, failed error) {
	var (
		all sync.WaitGroup
		mu  sync.Mutex // guards left and failed
	)
	for _, conn := range conns {
		all.Go(func() {
			was, err := n.access.joins.Leave(ctx, conn, room, store.CauseRemoved)
			if was {
				n.tellRoomLeft(conn.ID(), room, wire.ReasonRemoved)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			left++
		})
	}
	all.Wait()
	return left, failed
}

const (
	// maxServers limits a list of servers.
	maxServers = 1000
	// maxOwnedSizes limits the number of sizes that are read to count the entries of
	// servers. On a cluster that is one per server and bucket.
	maxOwnedSizes = 1 << 13
)

// ServerInfo describes one server (or bare PresenceManager) of the group, as Redis
// knows it.
type ServerInfo struct {
	// Incarnation is its random id. It changes at every start, and when a server
	// continues after it was declared dead.
	Incarnation string
	// Name is its Options.Name. It is empty if the server has none or runs a version
	// without names.
	Name string
	// Self reports whether it is the server that was asked.
	Self bool
	// LeaseLeft is the time until its lease runs out, by Redis's clock. If it is zero
	// or negative, the lease has run out and no other server has declared it dead yet.
	// It is 0 for dead servers.
	LeaseLeft time.Duration
	// LeaseAge is the time since it last renewed the lease, by Redis's clock, if its
	// LeaseTTL is the same as here, as required. It is 0 for dead servers.
	LeaseAge time.Duration
	// Dead reports whether it was declared dead, DeadFor ago, and its entries are still
	// being ended.
	Dead    bool
	DeadFor time.Duration
	// Owned is the number of entries and connections that it owns, or, if it is dead,
	// that are still to be ended. It is -1 if there are too many servers and buckets to
	// count, or if some part of Redis does not answer.
	Owned int
}

func (n *core) servers(ctx context.Context) ([]ServerInfo, error) {
	if err := n.checkRunningCtx(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	list, now, err := n.store.ServerLeases(ctx, maxServers)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	incs := make([]string, len(list))
	infos := make([]ServerInfo, len(list))
	for i, one := range list {
		incs[i] = one.Incarnation
		info := ServerInfo{Incarnation: one.Incarnation, Self: one.Incarnation == n.lease.Incarnation(), Dead: one.Dead, Owned: -1}
		if left := time.Duration(one.At-now) * time.Millisecond; one.Dead {
			info.DeadFor = -left
		} else {
			info.LeaseLeft, info.LeaseAge = left, n.opts.LeaseTTL-left
		}
		infos[i] = info
	}
	n.nameServers(ctx, infos, incs)
	if len(incs)*n.keys.Buckets() > maxOwnedSizes {
		return infos, nil
	}
	sizes, err := n.store.OwnedSizes(ctx, incs)
	if err != nil {
		return infos, nil // a node of the cluster may be away; the list is still useful
	}
	for i, size := range sizes {
		infos[i].Owned = int(size)
	}
	return infos, nil
}

// nameServers fills in the names of servers. It leaves a name empty if it cannot be
// read, because the list is useful without names.
func (n *core) nameServers(ctx context.Context, infos []ServerInfo, incs []string) {
	names, err := n.store.Names(ctx, incs)
	if err != nil {
		return
	}
	for i, name := range names {
		if keys.ValidateServerName(name) == nil { // any text may have been put into Redis by hand
			infos[i].Name = name
		}
	}
}
