package hub

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// After any change a list holds the first members and the asking connection. Earlier
// lists do not change.
func TestEncodedListFollowsMembers(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{0, 1, 2, 17, 60, 1000} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			t.Parallel()
			r, random := &members{}, rand.New(rand.NewPCG(uint64(limit), 1))
			type kept struct {
				text wire.Text
				want string
			}
			var earlier []kept
			for step := range 4000 {
				conn := fmt.Sprint("c", random.IntN(150))
				switch random.IntN(5) {
				case 0, 1:
					r.remove(conn)
				case 2:
					r.change(&store.Event{Type: store.Meta, Record: store.Record{Conn: conn, Meta: fmt.Appendf(nil, "%d", step)}})
				default:
					r.put(newMember(&store.Record{Conn: conn, Meta: fmt.Appendf(nil, `{"step":%d}`, step)}), 0)
				}
				if random.IntN(4) > 0 {
					continue
				}
				asker := fmt.Sprint("c", random.IntN(160))
				text := r.encodedList(limit, asker)
				got := string(text.Append(nil))
				require.Equal(t, listed(r, limit, asker), got)
				require.Equal(t, len(got), text.Size())
				require.LessOrEqual(t, len(text), maxLoose+4)
				earlier = append(earlier, kept{text, got})
			}
			for _, k := range earlier {
				require.Equal(t, k.want, string(k.text.Append(nil)))
			}
		})
	}
}

// listed returns the expected list, encoded with encoding/json.
func listed(r *members, limit int, asker string) string {
	list := r.list
	if limit > 0 && len(list) > limit {
		list = list[:limit:limit]
		if i, ok := r.at[asker]; ok && i >= limit {
			list = append(list[:limit-1:limit-1], r.list[i])
		}
	}
	plain := []wire.Member{}
	for _, m := range list {
		plain = append(plain, wire.Member{ID: m.Conn, Metadata: m.Meta()})
	}
	text, _ := json.Marshal(plain)
	return string(text)
}

// If some members come and go while the others stay, those are encoded once.
func TestEncodedMembersAreReused(t *testing.T) {
	t.Parallel()
	r := &members{}
	for i := range 49 {
		r.put(newMember(&store.Record{Conn: fmt.Sprint("stays", i)}), 0)
	}
	first := &r.encodedList(0, "")[1][0]
	for i := range 1000 {
		conn := fmt.Sprint("passes", i)
		r.put(newMember(&store.Record{Conn: conn}), 0)
		text := r.encodedList(0, conn)
		assert.Same(t, first, &text[1][0])
		assert.Len(t, text, 4)
		r.remove(conn)
	}
}
