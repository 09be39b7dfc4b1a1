package hub

import "time"

// stage is the progress of a mirror's snapshot.
type stage byte

const (
	stageIdle    stage = iota
	stageQueued        // waits in the snapshotQueue
	stageReading       // is being read; events are buffered
	stageMerging       // was read; waits for events to merge
)

// readState is the state of a mirror's snapshots: the one that is wanted or under way,
// and the results of the last ones.
type readState struct {
	stage      stage
	want       Cause     // why a snapshot is wanted; causeNone: none is
	needed     time.Time // the generation must be known from this time or later
	spoiled    bool      // the snapshot under way cannot be used
	merge      *pagedMerge
	retryAt    time.Time // when a snapshot may be tried again
	mergeUntil time.Time // when the merge is given up

	failures    int       // snapshots in a row that could not be read
	repeats     int       // snapshots in a row that were wanted soon after another
	outage      bool      // Redis was away since unconfirmed members were last extended
	triedAt     time.Time // when the last snapshot arrived or failed
	installedAt time.Time // when the last snapshot became the mirror
}

// needsSnapshot reports whether only a snapshot can bring the mirror up to date. One
// that only verifies unconfirmed members does not count.
func (r *readState) needsSnapshot() bool { return r.want > CauseVerify }

// buffersEvents reports whether events wait for the snapshot under way.
func (r *readState) buffersEvents() bool { return r.stage == stageReading || r.stage == stageMerging }

// require notes that events were dropped, so that only a snapshot helps.
func (r *readState) require(cause Cause, now time.Time) {
	if !r.needsSnapshot() {
		r.want, r.needed = cause, now
	}
}

// stop ends the snapshot under way.
func (r *readState) stop() {
	r.stage, r.merge, r.mergeUntil, r.spoiled = stageIdle, nil, time.Time{}, false
}
