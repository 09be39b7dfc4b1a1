package wire

import "strconv"

// OccupancyRequest is the payload of CommandSubscribeOccupancy and
// CommandUnsubscribeOccupancy.
type OccupancyRequest struct {
	RoomNames []Name `json:"roomNames"`
}

// Occupancy is the numbers of a room at a position, without its members. It is the
// payload of PushOccupancy.
type Occupancy struct {
	RoomName string
	Numbers
	Epoch string // with Seq the position of the room; if empty, Seq is left out too
	Seq   uint64
	Stale bool // Redis does not answer, and these are the last known numbers
}

// AppendJSON appends the payload.
func (o Occupancy) AppendJSON(dst []byte) []byte {
	return append(o.appendNumbers(appendRoom(dst, o.RoomName)), '}')
}

func (o *Occupancy) appendNumbers(dst []byte) []byte {
	dst = appendPosition(o.Numbers.append(dst), o.Epoch, o.Seq)
	if o.Stale {
		dst = append(dst, `,"stale":true`...)
	}
	return dst
}

// OccupancyAnswer is the answer to CommandSubscribeOccupancy.
type OccupancyAnswer struct {
	Rooms []OccupancyResult // each name once
}

// OccupancyResult is the answer about one room.
type OccupancyResult struct {
	Occupancy
	Code string // of the refusal; empty: subscribed
}

// AppendJSON appends the answer.
func (a OccupancyAnswer) AppendJSON(dst []byte) []byte {
	dst = append(dst, `{"rooms":{`...)
	for i := range a.Rooms {
		r := &a.Rooms[i]
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendString(dst, r.RoomName)
		dst = strconv.AppendBool(append(dst, `:{"success":`...), r.Code == "")
		if r.Code == "" {
			dst = r.appendNumbers(dst)
		} else {
			dst = appendString(append(dst, `,"code":`...), r.Code)
		}
		dst = append(dst, '}')
	}
	return append(dst, "}}"...)
}
