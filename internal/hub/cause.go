package hub

// Cause is the reason for which a snapshot was read.
type Cause byte

// The causes of snapshots. Stats counts them by their names.
const (
	causeNone         Cause = iota
	CauseVerify             // "verify": before unconfirmed members are reported as left
	CauseFirst              // "first": the room was not mirrored
	CauseGap                // "gap": an event did not arrive
	CauseFork               // "fork": the tags show another history
	CauseEpoch              // "epoch": an event belongs to another epoch
	CauseCompare            // "compare": Redis has another position
	CauseResubscribed       // "resubscribed": as compare, in the first comparison after events may have been missed
	CauseOverflow           // "overflow": events were dropped
	CauseUnreadable         // "unreadable": an event could not be decoded
	CauseInconsistent       // "inconsistent": an event about a connection that is no member
	numCauses
)

// String returns the name of the cause.
func (c Cause) String() string {
	names := [numCauses]string{
		"none", "verify", "first", "gap", "fork", "epoch", "compare", "resubscribed", "overflow", "unreadable", "inconsistent",
	}
	if c >= numCauses {
		return "unknown"
	}
	return names[c]
}

// RepairCauses returns the causes for which a mirrored room is read again.
func RepairCauses() []Cause {
	var list []Cause
	for cause := CauseVerify; cause < numCauses; cause++ {
		if cause != CauseFirst {
			list = append(list, cause)
		}
	}
	return list
}
