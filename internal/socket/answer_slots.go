package socket

import (
	"context"
	"slices"
)

// answerSlots limits the commands that prepare a large answer at the same time.
const answerSlots = 8

// slotWait is a command that waits until it may prepare a large answer.
type slotWait struct {
	t       *task
	granted chan struct{}
}

// AwaitAnswerSlot waits until there is space for a large answer, which is a list of members.
// Commands call it before they collect their answer, and after any callback of the app
// that may hang. ctx is that of Handler.Begin, or derived from it. For any other context
// AwaitAnswerSlot does nothing. The error is that of ctx.
//
// If all commands that run at once prepared their answers at once, the client would be
// sent many times the size of its queue.
func AwaitAnswerSlot(ctx context.Context) error {
	t, _ := ctx.Value(taskKey{}).(*task)
	if t == nil {
		return nil
	}
	s := (*Socket)(t.socketContext)
	w := s.askSlot(t)
	if w == nil {
		return nil
	}
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
		s.cancelSlot(w)
		return context.Cause(ctx)
	}
}

// askSlot returns the wait for an answer slot, or nil if the task need not wait.
func (s *Socket) askSlot(t *task) *slotWait {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.QueueBytes <= 0 || t.done || t.slot || s.ending != nil {
		return nil
	}
	sc := s.commands
	if len(sc.waiting) == 0 && s.freeSlot() {
		s.takeSlot(t)
		return nil
	}
	w := &slotWait{t, make(chan struct{})}
	sc.waiting = append(sc.waiting, w)
	return w
}

// freeSlot reports whether one more large answer may be prepared. The caller holds mu.
func (s *Socket) freeSlot() bool {
	sc := s.commands
	return sc.slots < answerSlots && s.queued()+sc.slots*s.half()/answerSlots < s.half()
}

func (s *Socket) takeSlot(t *task) {
	t.slot = true
	s.commands.slots++
}

// grantSlots gives free slots to waiting tasks. The caller holds mu.
func (s *Socket) grantSlots() {
	sc := s.commands
	if sc == nil {
		return
	}
	for len(sc.waiting) > 0 && s.freeSlot() {
		w := sc.waiting[0]
		sc.waiting[0] = nil
		sc.waiting = sc.waiting[1:]
		s.takeSlot(w.t)
		close(w.granted)
	}
}

// cancelSlot ends the wait.
func (s *Socket) cancelSlot(w *slotWait) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sc := s.commands; sc != nil {
		sc.waiting = slices.DeleteFunc(sc.waiting, func(other *slotWait) bool { return other == w })
	}
}
