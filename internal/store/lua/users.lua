-- users.lua: users and the numbers of a room. A room is numbered from its first user or
-- kept place on until it is empty. Then its position holds the number of its users, and
-- the hash presence:users:R holds
--
--   ''        the number of entries counted
--   user id   the number of live connections of the user, or '~' and the connection if
--             the user only has a kept place
--
-- A connection without a user counts as one user. A user has live connections or one
-- kept place, never both.
--
-- The part of a record in brackets (see lib.lua) is missing if it would be ' 0 0 0'.
-- until and cause exist only in a kept place. extra consists of items separated by
-- spaces, each a letter and a value. Items of later versions are kept. The only item
-- here is
--
--   p  conn:incarnation of the entry whose place this one took, for a join that is repeated
--
-- If the hash does not count as many entries as there are members, it or they were
-- lost. Then the position holds '?' instead of the number, events have no numbers, and
-- the records are counted again, at most RECOUNTED in a call. If that takes more than
-- one call, '?' is followed by the cursor. In between, the set presence:recount:R holds
-- the connections counted so far, and the field '\n' of the hash the number of users.

local RECOUNTED = 500
local RECOUNT_LIFE = 60000 -- of that set, in ms
local budget = RECOUNTED

local tally, heads = 0, 0 -- entries and users counted in the hash of the current room
local changed = {} -- its fields that have to be written, false: to be deleted

-- Ends the tags of events of this call that no op stands for.
local stem, stems = '', 0

-- Ends a kept place of the current room; see kept.lua.
local vacate

-- bracketed returns the fields of a record that show its user, grace and extra.
local function bracketed(user, grace, extra)
  if user == '' and grace == '0' and extra == '' then
    return ''
  end
  return ' ' .. #user .. ' ' .. grace .. ' ' .. #extra
end

-- person returns user, grace and extra of a record whose line ends at stop, the place
-- before its metadata, and until and cause if it is a kept place.
local function person(v, stop, tail)
  if tail == '' then
    return '', '0', '', stop
  end
  local ul, grace, el, till, cause = match(tail, '^ (%d+) (%d+) (%d+) ?(%d*) ?(%S?)')
  if not ul then
    return '', '0', '', stop
  end
  local a = stop + tonumber(ul)
  local b = a + tonumber(el)
  if cause == '' then
    till, cause = nil, nil
  end
  return sub(v, stop + 1, a), grace, sub(v, a + 1, b), b, till, cause
end

-- seatOf returns the field of a user, false if there is none.
local function seatOf(user)
  local seat = seats[user]
  if seat == nil then
    seat = call('HGET', usersKey, user)
    seats[user] = seat
  end
  return seat
end

-- forgetSeats drops what has changed in the hash, so that it is not written.
forgetSeats = function()
  changed = {}
end

local function setSeat(user, seat)
  seats[user], changed[user] = seat, seat
end

local function isPlace(seat)
  return byte(seat, 1) == 126 -- '~'
end

-- addSeat counts an entry.
local function addSeat(conn, user, kept)
  tally = tally + 1
  if kept then
    count(KEPT, 1)
  end
  local seat = false
  if user ~= '' then
    seat = seatOf(user)
  end
  if not seat then
    heads = heads + 1
  end
  if user == '' then
    return
  end
  if kept then
    setSeat(user, '~' .. conn)
  elseif not seat or isPlace(seat) then
    setSeat(user, '1') -- the record of the place is removed after this
  else
    setSeat(user, (seat + 1) .. '')
  end
end

-- removeSeat is the reverse. It returns false if the hash does not hold the entry.
local function removeSeat(conn, user, kept)
  tally = tally - 1
  if kept then
    count(KEPT, -1)
  end
  local last = user == ''
  if not last then
    local seat = seatOf(user)
    if kept then
      last = seat == '~' .. conn
    elseif not seat or isPlace(seat) then
      return false
    elseif seat == '1' then
      last = true
    else
      setSeat(user, (seat - 1) .. '')
    end
    if last then
      setSeat(user, false)
    end
  end
  if last then
    heads = heads - 1
  end
  return true
end

-- writeSeats writes what has changed in the hash.
writeSeats = function()
  unwritten = false
  local some, gone = { '', tally .. '' }, {}
  if cursor then
    some[3], some[4] = '\n', heads .. ''
  end
  for user, seat in pairs(changed) do
    if seat then
      some[#some + 1] = user
      some[#some + 1] = seat
    else
      gone[#gone + 1] = user
    end
  end
  changed = {}
  spread('HSET', usersKey, some)
  spread('HDEL', usersKey, gone)
end

-- setUser counts a change of a member, whose record is written or deleted beside it:
-- from user0 to user, nil: none. kept0 and kept say whether it is a kept place. The
-- users are those of the records, never that of an op that changes nothing.
local function setUser(conn, user0, kept0, user, kept)
  if not users and not cursor then
    if kept0 then
      count(KEPT, -1)
    end
    if kept then
      count(KEPT, 1)
    end
    return
  end
  if user0 == user and kept0 == kept then
    return
  end
  local holds, fits = true, true
  if not users then
    holds = user0 and call('SREM', recountKey, conn) == 1
    if user then
      call('SADD', recountKey, conn)
    end
  end
  if user0 and holds then
    fits = removeSeat(conn, user0, kept0)
  end
  if user then
    addSeat(conn, user, kept)
  end
  writeSeats()
  if not fits then
    users, cursor = false, nil
  elseif users then
    users = heads
  end
end

-- figures returns the numbers of the room, and of a user with more connections than the
-- hash says, in the form of an event.
local function figures(user, more)
  if not users then
    return ''
  end
  local connections = ''
  if user ~= '' then
    local seat = seatOf(user)
    connections = more or 0
    if seat and isPlace(seat) then
      connections = connections + 1
    elseif seat then
      connections = connections + seat
    end
  end
  return ':' .. connections .. ':' .. size .. ':' .. users
end

-- memberOf returns the user of a record, and whether it is a kept place.
local function memberOf(v)
  local inc, tail, stop = match(v, '^%S+( %S+ )%d+ %d+ %d+ %S %d+ %d+ %d+ %d+ %d+([^\n]*)\n()')
  if not inc then
    return '', false
  end
  local user = person(v, stop - 1, tail)
  return user, inc == KEPT
end

-- continues reports whether a recount that an earlier call began can go on.
local function continues()
  local h = call('HMGET', usersKey, '', '\n')
  local n = try('SCARD', recountKey)
  if failed(n) or h[1] ~= n .. '' or not h[2] then
    return false
  end
  tally, heads = n, tonumber(h[2])
  return true
end

-- finish ends a recount.
local function finish(marked)
  if marked then
    call('DEL', recountKey)
    changed['\n'] = false
  end
  if tally ~= size then
    -- Members have gone or come without a script, so the count begins again.
    users = false
    forgetSeats()
    call('DEL', usersKey, recountKey)
    return
  end
  users = heads
  writeSeats()
  count(KEPT, 0)
  if entries == 0 and call('HLEN', usersKey) == 1 then
    call('DEL', usersKey)
    users = nil -- there is neither a user nor a kept place
  end
end

-- recount counts members of the current room again.
local function recount()
  users = false
  if cursor and not continues() then
    cursor = nil
  end
  if budget < 1 then
    return
  end
  if not cursor then
    call('DEL', usersKey, recountKey)
    forgetSeats()
    seats, tally, heads = {}, 0, 0
    count(KEPT, 0)
    entries = 0
  end
  local page, next = nil, '0'
  if not cursor and size <= budget then
    page = call('HGETALL', members)
  else
    local r = call('HSCAN', members, cursor or '0', 'COUNT', budget)
    next, page = r[1], r[2]
  end
  local marked = cursor or next ~= '0'
  local surplus = {}
  for i = 1, #page, 2 do
    local conn = page[i]
    if not marked or call('SADD', recountKey, conn) == 1 then
      local user, kept = memberOf(page[i + 1])
      local seat = user ~= '' and seatOf(user)
      if seat and kept then
        surplus[#surplus + 1] = conn
        tally = tally + 1
        count(KEPT, 1)
      else
        if seat and isPlace(seat) then
          surplus[#surplus + 1] = sub(seat, 2)
        end
        addSeat(conn, user, kept)
      end
    end
  end
  budget = budget - #page / 2
  if next == '0' then
    cursor = nil
    finish(marked)
  else
    cursor = next
    writeSeats()
    call('PEXPIRE', recountKey, RECOUNT_LIFE)
  end
  -- These users have live connections, or another place, beside a kept place.
  for i = 1, #surplus do
    stems = stems + 1
    vacate(surplus[i], stem .. '~' .. stems)
  end
end

-- measure makes sure that the size of the room is known. It returns an error text if
-- Redis refuses.
local function measure()
  if not size then
    local n = try('HLEN', members)
    if failed(n) then
      return n.err
    end
    size, before = n, n
  end
end

-- plain reports whether the members, whose position was lost, have no numbers.
local function plain()
  if placed or size > budget then
    return false
  end
  budget = budget - size
  local list = call('HGETALL', members)
  for i = 2, #list, 2 do
    local user, kept = memberOf(list[i])
    if kept or user ~= '' then
      return false
    end
  end
  return true
end

-- lacksKeys makes the numbers of the room known, before anything of it is written. A
-- personal op makes the room numbered. user is that of the op. It returns true if the
-- op has to be repeated in a call that names the keys of users.
local function lacksKeys(personal, user)
  if users == nil and not personal or users ~= nil and checked then
    return false
  end
  if not usersKey then
    if not personal and plain() then
      users = nil
      return false
    end
    return true
  end
  if off or measure() then
    return false -- the op will fail in the same way
  end
  checked = true
  local h = try('HMGET', usersKey, '', user or '')
  if failed(h) then
    users, cursor, off = false, nil, true
    return false
  end
  if user and user ~= '' then
    seats[user] = h[2]
  end
  tally, heads = size, users or size
  if size == 0 or users == nil then
    if h[1] then
      call('DEL', usersKey)
    end
    seats, users, cursor = {}, nil, nil
  elseif not users or h[1] ~= size .. '' then
    recount()
    moved = moved or placed -- the position gets the result
  end
  if users == nil and personal then
    -- The first entry that counts: all others have no user.
    users, tally, heads, unwritten = size, size, size, true
  end
  return false
end
