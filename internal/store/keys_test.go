package store

import (
	"strconv"
)

// testKeys are names like those of the library. The bucket of a room is the length of
// its name, so that a test can choose it.
type testKeys struct{ buckets int }

func (k testKeys) Buckets() int { return k.buckets }

func (k testKeys) RoomBucket(room string) int { return len(room) % k.buckets }

func (k testKeys) ConnBucket(conn string) int { return len(conn) % k.buckets }

func (k testKeys) Members(room string) string { return "t:presence:members:" + room }

func (k testKeys) Conn(room, conn string) string { return "t:presence:conn:" + room + ":" + conn }

func (k testKeys) State(room, conn string) string {
	return "t:presence:state:" + room + ":" + conn
}

func (k testKeys) Seq(room string) string { return "t:presence:seq:" + room }

func (k testKeys) Users(room string) string { return "t:presence:users:" + room }

func (k testKeys) Recount(room string) string { return "t:presence:recount:" + room }

func (k testKeys) RoomMeta(room string) string { return "t:room-meta:" + room }

func (k testKeys) ConnMeta(conn string) string { return "t:connection-meta:" + conn }

func (k testKeys) Owned(bucket int, inc string) string {
	return "t:" + strconv.Itoa(bucket) + ":presence:owned:" + inc
}

func (k testKeys) Fence(bucket int, inc string) string {
	return "t:" + strconv.Itoa(bucket) + ":fence:" + inc
}

func (k testKeys) Rooms(bucket int) string { return "t:" + strconv.Itoa(bucket) + ":presence:rooms" }

func (k testKeys) Kept(bucket int) string { return "t:" + strconv.Itoa(bucket) + ":presence:kept" }

func (k testKeys) Instances() string { return "t:instances" }

func (k testKeys) Dead() string { return "t:dead" }

func (k testKeys) Name(inc string) string { return "t:server-name:" + inc }

func (k testKeys) Format() string { return "t:format" }

func (k testKeys) OtherFormat() string { return "t:{0}:format" }

func (k testKeys) Canary() string { return "t:canary" }

func (k testKeys) Clustered() bool { return k.buckets > 1 }

func (k testKeys) OtherServerKeys() []string { return []string{"t:theirs"} }

func (k testKeys) EventsPrefix() string { return "t:0:presence:events:" }

func (k testKeys) ServerChannel(inc string) string { return "t:0:server:" + inc }
