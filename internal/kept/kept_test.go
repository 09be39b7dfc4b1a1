package kept

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// heartbeat is the interval of the heartbeats in these tests.
const heartbeat = 5 * time.Second

// leftOnce checks that n places of a bucket have left, each once, no earlier than their
// deadline and within a time after it.
func leftOnce(t *testing.T, r *redis, bucket, first, n int, within time.Duration) {
	t.Helper()
	r.do(func() {
		for i := range n {
			late := r.left[id(bucket, first+i)]
			if len(late) != 1 || late[0] < 0 || late[0] > within.Milliseconds() {
				t.Fatalf("place %d of bucket %d left so many ms after its deadline: %v", first+i, bucket, late)
			}
		}
	})
}

// noneLeft checks that no place has left.
func noneLeft(t *testing.T, r *redis) {
	t.Helper()
	r.do(func() { require.Empty(t, r.left) })
}

// count returns the number of calls to Redis of one kind, or of all.
func (r *redis) count(names ...string) (n int) {
	r.do(func() {
		if len(names) == 0 {
			for _, calls := range r.calls {
				n += calls
			}
		}
		for _, name := range names {
			n += r.calls[name]
		}
	})
	return n
}

// The server that was told of a place ends it at its deadline. It makes no call before,
// and none after.
func TestPlaceEndsAtItsDeadline(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 2)
		defer a.kill()
		a.add(0, 0, 3, r.keep(0, 0, 3, 10*time.Second))
		a.add(1, 0, 1, r.keep(1, 0, 1, 5*time.Second))
		require.Equal(t, 4, a.Stats().Pending)
		pass(5*time.Second - time.Millisecond)
		require.Zero(t, r.count())
		pass(200 * time.Millisecond)
		leftOnce(t, r, 1, 0, 1, 150*time.Millisecond)
		pass(5 * time.Second)
		leftOnce(t, r, 0, 0, 3, 150*time.Millisecond)
		require.Equal(t, 2, r.count("clean up"))
		require.Equal(t, 4, r.count(), "one write and one call for each deadline")
		s := a.Stats()
		require.EqualValues(t, 4, s.GraceOver)
		require.Zero(t, s.Pending)
		var observed uint64
		for _, n := range s.Lag.Buckets {
			observed += n
		}
		require.EqualValues(t, 4, observed)
		pass(time.Hour)
		require.Equal(t, 4, r.count())
		require.Zero(t, a.wheel.Armed())
	})
}

// If the estimate of the clock is wrong, Redis decides, and is not asked all the time.
func TestPlaceNeverEndsEarly(t *testing.T) {
	for name, ahead := range map[string]time.Duration{"ahead": 800 * time.Millisecond, "behind": -800 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a := newServer(t, r, 1)
				defer a.kill()
				a.set(func() { a.ahead = ahead })
				a.add(0, 0, 10, r.keep(0, 0, 10, 5*time.Second))
				pass(5*time.Second - time.Millisecond)
				noneLeft(t, r)
				require.LessOrEqual(t, r.count("clean up"), 10)
				pass(time.Second)
				leftOnce(t, r, 0, 0, 10, time.Second)
			})
		})
	}
}

// A clock that is too wrong is reported, and the places end when it is right again.
func TestRefusedClock(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		defer a.kill()
		a.set(func() { a.ahead = 2 * time.Second })
		a.add(0, 0, 1, r.keep(0, 0, 1, 2*time.Second))
		pass(5 * time.Second)
		noneLeft(t, r)
		a.set(func() {
			require.Positive(t, a.refused)
			require.LessOrEqual(t, a.refused, 8)
			a.ahead = 0
		})
		pass(time.Second)
		leftOnce(t, r, 0, 0, 1, 5*time.Second)
	})
}

// No place ends in an outage, nor within a second after a failed call.
func TestNoEndDuringAnOutage(t *testing.T) {
	for name, outage := range map[string]func(s *server, on bool){
		"refused":    func(s *server, on bool) { s.cut = on },
		"hanging":    func(s *server, on bool) { s.hang = on },
		"no contact": func(s *server, on bool) { s.noContact = on },
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a := newServer(t, r, 1)
				defer a.kill()
				a.heartbeats(heartbeat)
				a.add(0, 0, 2, r.keep(0, 0, 2, 10*time.Second))
				pass(9 * time.Second)
				a.set(func() { outage(a, true) })
				pass(20 * time.Second)
				noneLeft(t, r)
				require.Equal(t, 2, a.Stats().Pending)
				var failed time.Time
				a.set(func() { outage(a, false); failed = a.failed })
				time.Sleep(time.Until(failed.Add(time.Second - time.Millisecond)))
				if name != "no contact" {
					noneLeft(t, r)
				}
				pass(4 * time.Second)
				leftOnce(t, r, 0, 0, 2, 24*time.Second)
				require.Zero(t, a.Stats().Pending)
			})
		})
	}
}

// A call that fails just before the deadline may have kept the user from coming back.
func TestNoEndSoonAfterAFailure(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		defer a.kill()
		a.add(0, 0, 1, r.keep(0, 0, 1, 5*time.Second))
		pass(5*time.Second - 100*time.Millisecond)
		failed := time.Now()
		a.set(func() { a.failed = failed })
		time.Sleep(time.Second - time.Millisecond)
		noneLeft(t, r)
		pass(time.Second)
		leftOnce(t, r, 0, 0, 1, 2*time.Second)
	})
}

// If the server that was told of a place dies, another one finds it at its heartbeat.
func TestPlaceOfADeadServerIsFound(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b, off := newServer(t, r, 4), newServer(t, r, 4), newServer(t, r, 4)
		defer b.kill()
		defer off.kill()
		off.set(func() { off.disabled = true })
		a.heartbeats(heartbeat)
		b.heartbeats(heartbeat)
		off.heartbeats(heartbeat)
		for bucket := range 4 {
			a.add(bucket, 0, 700, r.keep(bucket, 0, 700, time.Duration(10+bucket)*time.Second))
		}
		pass(9 * time.Second)
		a.kill()
		before := r.count()
		pass(time.Second - time.Millisecond)
		require.Equal(t, 4, before, "one call for each heartbeat")
		require.Equal(t, before, r.count())
		pass(10 * time.Second)
		for bucket := range 4 {
			leftOnce(t, r, bucket, 0, 700, heartbeat+time.Second)
		}
		require.EqualValues(t, 2800, b.Stats().GraceOver)
		require.Zero(t, off.Stats().GraceOver)
		require.Zero(t, a.Stats().GraceOver)
	})
}

// Heartbeats at the moment of the deadline leave the place to the server that was told.
func TestOthersWaitForTheirTurn(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b, c := newServer(t, r, 2), newServer(t, r, 2), newServer(t, r, 2)
		for _, s := range []*server{a, b, c} {
			defer s.kill()
		}
		for bucket := range 2 {
			a.add(bucket, 0, 500, r.keep(bucket, 0, 500, 5*time.Second))
		}
		pass(5*time.Second + time.Millisecond)
		b.Renewed()
		c.Renewed()
		pass(2 * time.Second)
		for bucket := range 2 {
			leftOnce(t, r, bucket, 0, 500, 500*time.Millisecond)
		}
		require.EqualValues(t, 1000, a.Stats().GraceOver)
		r.do(func() { require.Equal(t, 1000, r.names, "the others named a place") })
		require.Equal(t, 2*2, r.count("kept"), "each of the others looks once at each index")
	})
}

// The places of a server that has shut down end within a second after their deadlines, not
// only after the next heartbeat of another one. As long as that server lives, it ends
// nearly all of them: a look for one place may find another one that is overdue since just
// now.
func TestPlacesOfAServerThatShutDown(t *testing.T) {
	for name, lives := range map[string]bool{"lives": true, "shut down": false} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a, b := newServer(t, r, 2), newServerThatBeats(t, r, 2, 20*time.Second)
				defer a.kill()
				defer b.kill()
				for i := range 40 { // deadlines between heartbeats, at many moments
					a.add(i%2, i, 1, r.keep(i%2, i, 1, 21*time.Second+time.Duration(i)*170*time.Millisecond))
				}
				if !lives {
					a.kill()
				}
				b.heartbeats(20 * time.Second)
				pass(35 * time.Second)
				for i := range 40 {
					leftOnce(t, r, i%2, i, 1, time.Second)
				}
				if lives {
					require.Greater(t, a.Stats().GraceOver, uint64(30))
					require.Less(t, r.names, 50, "the other server named places")
				}
				require.Less(t, r.count("next"), 60)
			})
		})
	}
}

// A server that was not told gives users that come back after an outage some time. If
// it cannot write when it finds the place, it has noticed an outage.
func TestOthersGiveTime(t *testing.T) {
	for name, readOnly := range map[string]bool{"writable": false, "read only": true} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a := newServer(t, r, 1)
				defer a.kill()
				r.keep(0, 0, 1, 0)
				a.set(func() { a.readOnly = readOnly })
				a.Renewed()
				time.Sleep(100 * time.Millisecond)
				a.set(func() { a.readOnly = false })
				turn := othersTurn
				if readOnly {
					turn = time.Second
				}
				time.Sleep(turn - 100*time.Millisecond)
				noneLeft(t, r)
				pass(time.Second)
				leftOnce(t, r, 0, 0, 1, 2*time.Second)
			})
		})
	}
}

// A mirror on each of several servers may find the same overdue place.
func TestOverduePlaceIsLeftToItsServer(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, 1), newServer(t, r, 1)
		defer a.kill()
		defer b.kill()
		until := r.keep(0, 0, 100, 5*time.Second)
		a.add(0, 0, 100, until)
		time.Sleep(5*time.Second + time.Millisecond)
		b.add(0, 0, 100, until)
		time.Sleep(othersTurn - 10*time.Millisecond)
		require.EqualValues(t, 100, a.Stats().GraceOver)
		r.do(func() { require.Equal(t, 100, r.names) })
		pass(2 * time.Second)
		leftOnce(t, r, 0, 0, 100, 200*time.Millisecond)
	})
}

// If several servers sweep at once, each place leaves once.
func TestServersThatSweepAtOnce(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, 1), newServer(t, r, 1)
		defer a.kill()
		defer b.kill()
		until := r.keep(0, 0, 2000, 5*time.Second)
		a.add(0, 0, 2000, until)
		b.add(0, 0, 2000, until)
		pass(10 * time.Second)
		leftOnce(t, r, 0, 0, 2000, time.Second)
		require.EqualValues(t, 2000, a.Stats().GraceOver+b.Stats().GraceOver)
		require.Zero(t, a.Stats().Pending+b.Stats().Pending)

		r.keep(0, 2000, 2000, 0) // no server was told
		a.Renewed()
		b.Renewed()
		pass(10 * time.Second)
		leftOnce(t, r, 0, 2000, 2000, 2*time.Second)
	})
}

// A place that the index has lost ends if a mirror finds it. One that is not over goes
// back into the index.
func TestLostIndexIsRepaired(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		defer a.kill()
		a.heartbeats(heartbeat)
		over := r.keep(0, 0, 5, time.Second)
		until := r.keep(0, 5, 5, time.Minute)
		r.do(func() { clear(r.listed); clear(r.order) })
		pass(20 * time.Second)
		noneLeft(t, r)
		a.add(0, 0, 5, over)
		a.add(0, 5, 5, over) // wrong
		pass(2 * time.Second)
		leftOnce(t, r, 0, 0, 5, 22*time.Second)
		r.do(func() {
			require.Len(t, r.listed, 5)
			for _, listed := range r.listed {
				require.Equal(t, until, listed)
			}
			require.Len(t, r.left, 5)
		})
		pass(time.Minute)
		leftOnce(t, r, 0, 5, 5, time.Second)
	})
}

// An index with wrong deadlines is corrected and ends nothing early.
func TestWrongIndexIsRepaired(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		defer a.kill()
		a.heartbeats(heartbeat)
		r.keep(0, 0, 1000, 30*time.Second)
		r.keep(0, 1000, 1000, time.Hour)
		r.do(func() {
			clear(r.order)
			for i := range 1000 {
				r.listLocked(id(0, i), 1)                // early
				r.listLocked(id(0, 1000+i), 2)           // their connections are back
				r.listLocked(id(0, 2000+i), int64(10+i)) // without a record
				r.records[id(0, 1000+i)] = 0
			}
		})
		pass(29 * time.Second)
		noneLeft(t, r)
		r.do(func() {
			require.Len(t, r.listed, 1000)
			require.Equal(t, 3000, r.names, "each is named once")
		})
		pass(3 * time.Second)
		leftOnce(t, r, 0, 0, 1000, time.Second)
	})
}

// More places than timers: the index is followed, and nothing is late because of that.
func TestManyPlaces(t *testing.T) {
	const places = 100_000
	for name, steps := range map[string]int{"at once": 1, "in a minute": 600} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a := newServer(t, r, 1)
				defer a.kill()
				for i := range steps {
					n := places / steps
					a.add(0, i*n, n, r.keep(0, i*n, n, 10*time.Second+time.Duration(i)*100*time.Millisecond))
				}
				require.Equal(t, maxPlaces, a.Stats().Pending)
				n := places / steps * steps
				require.EqualValues(t, n-maxPlaces, a.Stats().Spilled)
				pass(9900 * time.Millisecond)
				require.Zero(t, r.count())
				pass(75 * time.Second)
				within := time.Second
				if steps == 1 {
					within = 5 * time.Second
				}
				leftOnce(t, r, 0, 0, n, within)
				require.EqualValues(t, n, a.Stats().GraceOver)
				calls := r.count()
				pass(time.Hour)
				require.Equal(t, calls, r.count(), "the index is followed no longer")
				require.Empty(t, a.buckets)
			})
		})
	}
}

// A place that Redis refuses to end does not keep others from ending, and costs little.
func TestRefusedPlace(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, 1), newServer(t, r, 1)
		defer a.kill()
		defer b.kill()
		b.heartbeats(heartbeat)
		const odd = pageSize + 10
		until := r.keep(0, 0, odd+10, 2*time.Second)
		r.do(func() {
			for i := range odd {
				r.refuse[id(0, i)] = true
			}
		})
		a.add(0, 0, 1, until)
		a.add(0, odd, 1, until)
		pass(10 * time.Second)
		leftOnce(t, r, 0, odd, 1, 500*time.Millisecond)
		leftOnce(t, r, 0, odd+1, 9, heartbeat+time.Second)
		pass(10 * time.Minute)
		r.do(func() {
			require.Len(t, r.left, 10)
			require.LessOrEqual(t, r.names, 20*odd)
			clear(r.refuse)
		})
		pass(70 * time.Second)
		leftOnce(t, r, 0, 0, odd, 12*time.Minute)
		require.Zero(t, a.Stats().Pending+b.Stats().Pending)
	})
}

// Stop interrupts a call, and nothing happens after it.
func TestStop(t *testing.T) {
	for name, hang := range map[string]func(s *server){
		"while a call hangs":    func(s *server) { s.hang = true },
		"while places are held": func(s *server) { s.noContact = true },
		"with a timer":          func(*server) {},
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a := newServer(t, r, 1)
				a.set(func() { hang(a) })
				until := r.keep(0, 0, 10, 5*time.Second)
				a.add(0, 0, 10, until)
				if name == "with a timer" {
					time.Sleep(time.Second)
				} else {
					time.Sleep(6 * time.Second)
				}
				began := time.Now()
				a.Stop()
				require.Equal(t, began, time.Now(), "Stop waited")
				a.set(func() { a.hang, a.noContact = false, false })
				calls := r.count()
				a.add(0, 0, 10, until)
				a.Renewed()
				a.Stop()
				pass(time.Minute)
				require.Equal(t, calls, r.count())
				require.Zero(t, a.wheel.Armed())
				noneLeft(t, r)
				a.kill()
			})
		})
	}
}

// Stop in the middle of a long pass leaves the rest to others.
func TestStopInAPass(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, 1), newServer(t, r, 1)
		defer b.kill()
		const places = 20_000
		a.add(0, 0, places, r.keep(0, 0, places, 5*time.Second))
		for left := 0; left == 0; r.do(func() { left = len(r.left) }) {
			time.Sleep(10 * time.Millisecond)
		}
		a.kill()
		r.do(func() { require.Less(t, len(r.left), places) })
		b.heartbeats(heartbeat)
		pass(10 * time.Second)
		leftOnce(t, r, 0, 0, places, 3*time.Second)
		require.EqualValues(t, places, a.Stats().GraceOver+b.Stats().GraceOver)
	})
}

// A place that is added again keeps its time. The same place with an earlier deadline is
// due earlier.
func TestPlacesAreAddedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := queue{of: make(map[placeID]*place)}
		now := time.Now()
		at := func(n int, d time.Duration) *place { return &place{placeID: id(0, n), at: now.Add(d)} }
		assert.True(t, q.add(at(1, 5*time.Second)))
		assert.True(t, q.add(at(2, 4*time.Second)))
		assert.True(t, q.add(at(1, 6*time.Second)))
		free := func(int) time.Time { return time.Time{} }
		assert.Empty(t, q.takeDue(now.Add(3*time.Second), 9, free))
		assert.True(t, q.add(at(1, 3*time.Second)))
		assert.Len(t, q.heap, 2)
		due := q.takeDue(now.Add(time.Hour), 9, free)
		require.Len(t, due, 2)
		assert.Equal(t, id(0, 1), due[0].placeID)
		assert.Empty(t, q.of)

		require.True(t, q.add(at(1, 0)))
		assert.Empty(t, q.takeDue(now, 9, func(int) time.Time { return now.Add(time.Second) }))
		assert.Len(t, q.takeDue(now.Add(time.Second), 9, func(int) time.Time { return now.Add(time.Second) }), 1)
	})
}

// While the clock of Redis is unknown nothing is timed: the index has the places.
func TestUnknownClock(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		defer a.kill()
		a.cfg.Clock = func() (int64, bool) { return 0, false }
		a.add(0, 0, 3, r.keep(0, 0, 3, 0))
		a.Renewed()
		pass(time.Minute)
		noneLeft(t, r)
		require.Zero(t, a.Stats().Pending)
		require.Equal(t, 1, r.count())
	})
}

var _ Store = (*store.Store)(nil)

// A place that was named too early is still known after contact was lost.
func TestLostContactAfterAnEarlyAttempt(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		defer a.kill()
		a.set(func() { a.ahead = 800 * time.Millisecond })
		a.add(0, 0, 3, r.keep(0, 0, 3, 5*time.Second))
		pass(4500 * time.Millisecond)
		require.Positive(t, r.count("clean up"))
		a.set(func() { a.noContact = true })
		pass(3 * time.Second)
		noneLeft(t, r)
		a.set(func() { a.noContact = false })
		pass(3 * time.Second)
		leftOnce(t, r, 0, 0, 3, 5*time.Second)
	})
}

// On a cluster a node that hangs does not delay the places of the others.
func TestOneNodeHangs(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		const buckets = 16
		a := newServer(t, r, buckets)
		defer a.kill()
		a.set(func() { a.hungBelow = buckets / 2 })
		for second := range 10 {
			for bucket := range buckets {
				a.add(bucket, second, 1, r.keep(bucket, second, 1, time.Duration(5+second)*time.Second))
			}
		}
		pass(20 * time.Second)
		for bucket := buckets / 2; bucket < buckets; bucket++ {
			leftOnce(t, r, bucket, 0, 10, time.Second)
		}
		r.do(func() { require.Len(t, r.left, 10*buckets/2) })
		a.set(func() { a.hungBelow = 0 })
		pass(5 * time.Second)
		for bucket := range buckets / 2 {
			leftOnce(t, r, bucket, 0, 10, 20*time.Second)
		}
	})
}
