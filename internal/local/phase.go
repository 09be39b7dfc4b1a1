package local

import "fmt"

// phase is the stage of an entry: whether the connection is to be in the room, and whether
// Redis holds the entry under its present id. Only entry.move changes it, by one of the
// transitions below.
//
//	phase      in the room  in Redis                    left by
//	out        no           no, or an earlier id        join
//	returning  no           no, or an earlier id        join (the next frame, if it may), leave, forget
//	unsent     yes          no, or an earlier id        send
//	sent       yes          perhaps: a join was sent    join written, refusal, full
//	held       yes          yes                         verify, conflict
//	verifying  yes          probably: being asked       update written, conflict
//
// Every phase in the room is also left by leave, silence, rejoin and forget.
//
// These facts are fields of entry, because they change independently of the phase:
//
//   - leaving: an earlier id has to leave, in any phase. The leave is written first.
//   - place.kept: an earlier id under which Redis may keep the place of the entry, in any
//     phase before held. The join takes that place, and a leave ends it.
//   - replaced: the id before the last rejoin, if the entry is unsent or sent.
//   - lapsed and overdue: the silence of the connection, in any phase in the room. The
//     next frame verifies a lapsed entry.
//   - refresh, personal, metaWritten, stateWritten: the parts of the entry that Redis lacks although
//     it holds the entry.
type phase uint8

const (
	out       phase = iota // it has left for good, or has not joined yet
	returning              // it ended because of a silence or a stall, and its connection may return
	unsent
	sent
	held
	verifying
	phaseCount
)

func (p phase) String() string {
	return [phaseCount]string{"out", "returning", "unsent", "sent", "held", "verifying"}[p]
}

// phases is a set of phases.
type phases uint8

func set(list ...phase) (s phases) {
	for _, p := range list {
		s |= 1 << p
	}
	return s
}

func (s phases) has(p phase) bool { return s&(1<<p) != 0 }

// transition is a change of the phase, named after its cause.
type transition uint8

const (
	// byJoin: the client or the app asks for the room, or a frame ends a silence.
	byJoin transition = iota
	// byLeave: the client or the app asks to leave, or the connection closes.
	byLeave
	// bySilence: the connection was silent for the TTL, or the server stalled.
	bySilence
	// byConflict: the connection has joined through another server.
	byConflict
	// byForget: another connection has taken the place.
	byForget
	// byFull: the answer to the join says that the room is full.
	byFull
	// byRejoin: Redis lost the entry, or the server has another incarnation. The entry
	// gets a new id.
	byRejoin
	// bySend: a batch takes the join, for the first time or again.
	bySend
	// byRefusal: the answer to the join proves that Redis does not hold the entry.
	byRefusal
	// byJoinWritten: Redis has the join.
	byJoinWritten
	// byVerify: Redis may have lost the entry or a part of it.
	byVerify
	// byUpdateWritten: Redis has an update, so it has the entry.
	byUpdateWritten
	transitionCount
)

func (t transition) String() string {
	return [transitionCount]string{
		"join", "leave", "silence", "conflict", "forget", "full", "rejoin", "send", "refusal", "join written", "verify", "update written",
	}[t]
}

// transitions lists the legal ones. There are no others.
var transitions = [transitionCount]struct {
	from phases
	to   phase
}{
	byJoin:          {from: set(out, returning), to: unsent},
	byLeave:         {from: set(returning, unsent, sent, held, verifying), to: out},
	bySilence:       {from: set(unsent, sent, held, verifying), to: returning},
	byConflict:      {from: set(held, verifying), to: out},
	byForget:        {from: set(returning, unsent, sent, held, verifying), to: out},
	byFull:          {from: set(sent), to: out},
	byRejoin:        {from: set(unsent, sent, held, verifying), to: unsent},
	bySend:          {from: set(unsent, sent), to: sent},
	byRefusal:       {from: set(sent), to: unsent},
	byJoinWritten:   {from: set(sent), to: held},
	byVerify:        {from: set(held, verifying), to: verifying},
	byUpdateWritten: {from: set(held, verifying), to: held},
}

// move changes the phase, and the counts that depend on it: the stored entries of the
// writer, the entries of the room and the entries that wait for a frame. Conn.mu is held.
//
// An illegal transition is a mistake in this package. Tests fail then. Outside tests it is
// logged and takes place, because reconciling repairs an entry, and a panic would end all
// entries of the server.
func (e *entry) move(by transition) {
	if !transitions[by].from.has(e.phase) {
		e.c.registry.illegal(fmt.Sprintf("%v while %v", by, e.phase))
	}
	wanted, written, waits := e.wanted(), e.written(), e.waitsForFrame()
	if e.phase = transitions[by].to; !e.wanted() {
		e.lapsed = false
	}
	if written != e.written() {
		e.writer.addStored(e.incarnation, int64(one(e.written())-one(written)))
	}
	e.countFrameWaiter(waits)
	switch {
	case !wanted && e.wanted():
		e.c.registry.addEntry(e)
	case wanted && !e.wanted():
		e.c.registry.removeEntry(e)
	}
}

// logIllegal is the illegal of a Registry outside tests.
func (r *Registry) logIllegal(transition string) {
	r.log.Error("mesh: illegal transition of an entry, a mistake in mesh", "transition", transition)
}

// wanted reports whether the entry is to be in the room.
func (e *entry) wanted() bool { return e.phase >= unsent }

// tried reports whether a join of the id may have reached Redis.
func (e *entry) tried() bool { return e.phase >= sent }

// written reports whether Redis is known to hold the entry. An entry that is being
// verified counts until Redis has answered that it is missing.
func (e *entry) written() bool { return e.phase >= held }

// in reports whether the connection is in the room, or joins it again at its next frame.
func (e *entry) in() bool { return e.phase != out }

// waitsForFrame reports whether the next frame of the connection does something to the
// entry.
func (e *entry) waitsForFrame() bool { return e.phase == returning || e.lapsed }

// setLapsed notes that the entry is silent past its TTL, or no longer. Conn.mu is held.
func (e *entry) setLapsed(lapsed bool) {
	waits := e.waitsForFrame()
	e.lapsed = lapsed
	e.countFrameWaiter(waits)
}

// countFrameWaiter counts the entry if it has begun or stopped to wait for a frame. waited
// is the value before. Conn.mu is held.
func (e *entry) countFrameWaiter(waited bool) {
	if now := e.waitsForFrame(); now != waited {
		e.c.frameWaiters.Add(int64(one(now) - one(waited)))
	}
}
