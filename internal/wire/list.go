package wire

import (
	"fmt"
	"math"
)

// The members on a page of CommandListPresence.
const (
	DefaultListLimit = 100
	MaxListLimit     = 1000
)

// ListPresenceRequest is the payload of CommandListPresence.
type ListPresenceRequest struct {
	RoomName Name     `json:"roomName"`
	Cursor   Name     `json:"cursor,omitempty"` // Extent.Next of the page before; empty: the first page
	Limit    *float64 `json:"limit,omitempty"`  // see Size
}

// Size returns the members on the page. If the limit is no whole number from 1 to
// MaxListLimit, the error wraps ErrPayload.
func (r *ListPresenceRequest) Size() (int, error) {
	if r.Limit == nil {
		return DefaultListLimit, nil
	}
	n := *r.Limit
	if !(n >= 1 && n <= MaxListLimit) || n != math.Trunc(n) {
		return 0, fmt.Errorf("%w: limit must be a whole number from 1 to %d", ErrPayload, MaxListLimit)
	}
	return int(n), nil
}
