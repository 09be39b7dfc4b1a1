-- lib.lua: the common part of all scripts that change rooms. It is put before the
-- script, so everything is local and nothing runs by itself. The costs here are calls
-- of Redis, strings (Lua in Redis hashes every byte of each), patterns with captures,
-- and tables. The code makes few of them.
--
-- A record (one field of a room's hash, see codec.go) is
--
--   entry incarnation ttl stateLength stateVersion flag metaVersion metaLength stateUntil joinedAt seq
--     [ userLength grace extraLength[ until cause]] \n user extra meta state
--
-- with times in ms. JSON of users is never decoded: the lengths show where it ends. The
-- fields that scripts test most come first: whether the record still is that entry of
-- that incarnation, without TTL and state, is a comparison of its beginning. The fields
-- that Redis determines come last, so that the owner can build the rest. users.lua
-- explains the part in brackets, which most records do not have.
--
-- The position of a room is 'epoch seq tag', followed by ' * numbers' if the room is
-- numbered (see users.lua), and by ' incarnation entries' for each incarnation with
-- entries in it, so that a message to the room's members can find their servers. Kept
-- places count for '~'. The epoch ends in '@' and the time of its beginning in ms.

local call, try = redis.call, redis.pcall
local find, sub, match, byte = string.find, string.sub, string.match, string.byte

local args, keys = ARGV, KEYS

local clock = call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local nowText = string.format('%.0f', now)

-- The rest of a record after entry and incarnation: ttl, the fields of the state (with
-- length and version), those of the metadata (with version and length), stateUntil,
-- joinedAt, seq, and the text between seq and the end of the line.
local REST = '^(%d+) ((%d+) (%d+) %S )((%d+) (%d+) )(%d+) (%d+) (%d+)([^\n]*)\n'
local ODD = 'WRONGFORMAT not of this layout'

-- The rest of a record in an event without TTL, metadata and state. seq follows.
local BARE = '0 0 0 . 0 0 0 0 '

-- The incarnation of kept places.
local KEPT = ' ~ '

local function failed(v)
  return type(v) == 'table' and v.err
end

-- spread calls a command with all items of a list in parts, because Lua can unpack only
-- a limited number.
local function spread(command, key, list)
  for from = 1, #list, 500 do
    local to = math.min(from + 499, #list)
    if key then
      call(command, key, unpack(list, from, to))
    else
      call(command, unpack(list, from, to))
    end
  end
end

-- Positions of the rooms of this call, in the order of their enter calls. They are read
-- together at the beginning and written together at the end. At the end Redis refuses
-- nothing any more: each op reads before it writes (see stand), and for lack of memory
-- Redis refuses only the first write.
local positions, firstPosition, entered = {}, nil, 0

local function readPositions(from, count)
  firstPosition = from
  for i = 0, count - 1, 500 do
    local some = call('MGET', unpack(keys, from + i, from + math.min(i + 500, count) - 1))
    if i == 0 then
      positions = some
    else
      for n = 1, #some do
        positions[i + n] = some[n]
      end
    end
  end
end

-- The current room. Each room is entered once.
local room, members, seqKey, channel
local epoch, seq, tag, prev -- seq: decimal text; epoch nil: not read yet
local position -- 'epoch seq tag', '' if there is none yet
local tracked -- the caller has a rule for it
local moved -- something of it has been written
local homes -- the counts of its incarnations as in the position, without that of home
local home, entries -- the incarnation that is being counted, as ' incarnation ', and its number of entries
local size, before -- number of members now (nil: not read) and before the call
local missed -- the end of an entry without a record has been published
local placed -- it had a position before this call
-- Keys of its users, nil if the call does not name them; and what users.lua knows of it.
local usersKey, keptKey, recountKey
local users -- number of users; nil: the room is not numbered, false: it is, and the number is unknown
local cursor -- where its recount goes on, nil: none has begun
local rebuilding -- time in ms until which it is being rebuilt, or nil
local checked -- the hash of users has been compared with the members
local off -- that hash cannot be used
local seats -- fields of that hash
local unwritten -- the room has become numbered, and the hash does not exist yet
local writeSeats, forgetSeats -- see users.lua

local filled, emptied = {}, {} -- names of rooms
local standing = {} -- key, value, ... of rooms with a new position

-- How long the position of an empty room is kept, and the age of its epoch from which a
-- room counts as used instead of visited, in ms.
--
-- No promise depends on the position of an empty room. Late batches are refused by the
-- number in the fence, and repeated ones by the ids of their entries. The position only
-- saves work of mirrors. If it is gone, the next join begins a new epoch, and a mirror
-- cannot tell whether Redis lost the members that it lists. It keeps them as
-- unconfirmed for LeaseTTL + 1 s. Therefore the position must still exist when a mirror
-- that missed the last leave is compared. That happens every 10 s, and once more if
-- Redis did not answer the call (1.8 s). A client that reconnects, or a page that is
-- reloaded, takes a few seconds and joins the same epoch.
--
-- Positions of visited rooms are kept no longer than that, because otherwise anyone
-- could fill Redis with made-up names. An untracked room has no subscribers, so its
-- position orders nothing. It is kept as long as that of a visited room, because
-- another server may track the room.
local KEEP_USED, KEEP_VISITED = 3600000, 15000
local USED_AFTER = 60000

-- keep returns how long to keep the position of the current room, which is empty now.
-- An epoch without a time was begun by an earlier version.
local function keep()
  local began = tracked and (match(epoch, '@(%d+)$') or '0')
  if began and now - tonumber(began) > USED_AFTER then
    return KEEP_USED
  end
  return KEEP_VISITED
end

-- numbers returns the text of the room's numbers in the position.
local function numbers()
  if users == nil then
    return ''
  end
  local text = ' * ?' .. (cursor or '')
  if users then
    text = ' * ' .. users
  end
  if rebuilding then
    text = text .. '/' .. string.format('%.0f', rebuilding)
  end
  return text
end

-- clearUsers deletes the hash of users of the current room, which is empty or not
-- numbered. It may be left over if other keys of the room were lost.
local function clearUsers()
  if not usersKey or off or users == nil and placed then
    return
  end
  local n = 1
  if not checked then
    n = try('HLEN', usersKey)
  end
  if not failed(n) and n > 0 then
    call('DEL', usersKey)
  end
end

local function fold()
  if home and entries > 0 then
    homes = homes .. home .. entries
  end
  home = nil
end

-- settle collects the new position of the current room.
local function settle()
  if not moved then
    return
  end
  fold()
  -- A room that lost its records is empty only if it counts no incarnation any more.
  -- Until then the counts show readers that records are missing. Kept places do not
  -- keep it from being empty, because no server could write their records again.
  if missed and (homes == '' or match(homes, '^ ~ %d+$')) then
    size = call('HLEN', members)
    if size == 0 then
      homes = ''
    end
  end
  if size == 0 and (homes == '' or not missed) then
    emptied[#emptied + 1] = room
    clearUsers()
    call('SET', seqKey, position, 'PX', keep())
    return
  end
  if before == 0 then
    filled[#filled + 1] = room
  end
  if unwritten and users then
    writeSeats()
  elseif users == nil and not placed then
    clearUsers()
  end
  local n = #standing
  standing[n + 1] = seqKey
  standing[n + 2] = position .. numbers() .. homes
end

local function enter(name, flag, channels, membersKey, usersName, keptName, recountName)
  settle()
  tracked = flag == '1'
  usersKey, keptKey, recountKey = usersName, keptName, recountName
  users, cursor, rebuilding, checked, off, seats, unwritten = nil, nil, nil, false, false, {}, false
  room, members, seqKey, channel = name, membersKey, keys[firstPosition + entered], channels .. name
  entered = entered + 1
  epoch, moved, home, size, before, missed, placed = nil, false, nil, nil, nil, false, false
  forgetSeats()
end

-- attempt runs work, and then writes what was collected. It also does so if Redis stops
-- the work halfway, for example because the user has lost a right: otherwise a change
-- would belong to a position that no mirror misses, or the number of a published event
-- would be used again. It returns the error of Redis as the script's reply, because an
-- error that is raised gets another text.
local function attempt(work, roomsKey)
  local fine, why = pcall(work)
  settle()
  spread('MSET', nil, standing)
  spread('SADD', roomsKey, filled)
  spread('SREM', roomsKey, emptied)
  return not fine and { err = why }
end

-- stand makes sure that the position of the current room is known. fresh is the
-- beginning of the epoch of a room without a position. Call it before anything of the
-- room is written. It returns an error text if the room cannot be changed.
local function stand(fresh)
  if epoch then
    return nil
  end
  local p = positions[entered]
  if not p then
    local v = try('GET', seqKey) -- MGET returns nothing for a key of another type
    if failed(v) then
      return v.err
    end
    local n = try('HLEN', members)
    if failed(n) then
      return n.err
    end
    size, before = n, n
    -- Members without a position have numbers of a lost epoch. The new epoch begins
    -- above them, so that the higher number still is the newer one.
    epoch, seq, tag, position, homes = fresh .. '@' .. nowText, n == 0 and '0' or nowText, '-', '', ''
    if n > 0 then
      users = false -- some of them may be users
    end
    return nil
  end
  local i = find(p, ' ', 1, true) or 0
  local _, j = find(p, '^%d+ ', i + 1)
  if i == 0 or not j then
    return ODD
  end
  local k = find(p, ' ', j + 1, true) or #p + 1
  placed = true
  epoch, seq, tag, position = sub(p, 1, i - 1), sub(p, i + 1, j - 1), sub(p, j + 1, k - 1), sub(p, 1, k - 1)
  if byte(p, k + 1) == 42 and byte(p, k + 2) == 32 then -- '* '
    local _, e, n, at, till = find(p, '^(%d*)%??(%d*)/?(%d*)', k + 3)
    users = tonumber(n) or false
    if not users and at ~= '' then
      cursor = at
    end
    rebuilding = tonumber(till)
    if rebuilding and rebuilding <= now then
      rebuilding = nil
    end
    k = e + 1
  end
  homes = sub(p, k)
end

-- following returns the seq of the next event.
local function following()
  return (seq + 1) .. ''
end

-- advance moves the position of the current room, which is known, by one event.
local function advance(mark, next)
  seq, prev, tag, moved = next or following(), tag, mark, true
  position = epoch .. ' ' .. seq .. ' ' .. mark
end

-- count adds by (1 or -1) to the number of entries of an incarnation.
local function count(inc, by)
  if home ~= inc then
    fold()
    home, entries = inc, 0
    local a, b = find(homes, inc, 1, true)
    if a then
      local c = find(homes, ' ', b + 1, true) or #homes + 1
      entries = tonumber(sub(homes, b + 1, c - 1)) or 0
      homes = sub(homes, 1, a - 1) .. sub(homes, c)
    end
  end
  entries = entries + by
end

-- sized adds by (1 or -1) to the number of members of the current room, and returns it.
local function sized(by)
  if size then
    size = size + by
  else
    size = call('HLEN', members)
    before = size - by
  end
  return size
end

-- bereft reports whether the current room, which has just got its first entry, counted
-- others: then their records are lost. The room begins a new epoch, so that mirrors do
-- not mistake missing members for members that left.
local function bereft(fresh)
  if size ~= 1 or homes == '' and (not home or entries <= 0) then
    return false
  end
  epoch, seq, tag, homes, home, rebuilding = fresh .. '@' .. nowText, '0', '-', '', nil, nil
  return true
end

-- publish publishes the event that advance has made room for.
local function publish(kind, cause, conn, record)
  call('PUBLISH', channel, kind .. ' ' .. epoch .. ' ' .. tag .. ' ' .. prev .. ' ' .. nowText .. ' ' .. cause .. ' ' ..
    conn .. ' ' .. record)
end

-- counted returns the number of entries that the current room counts for all
-- incarnations except the one that is being counted.
local function counted()
  local sum = 0
  for n in string.gmatch(homes, ' %S+ (%d+)') do
    sum = sum + tonumber(n)
  end
  return sum
end

-- overcounted reports whether the current room counts more entries than it has records,
-- given the incarnation of one of them: then some records are lost.
local function overcounted(inc)
  count(inc, 0)
  return counted() + entries > (size or call('HLEN', members))
end

-- farewell publishes the leave of an entry without a record in the current room,
-- because mirrors may still list it. Mirrors that do not list it ignore the event.
local function farewell(conn, entry, inc, mark, cause)
  advance(mark)
  missed = true
  if overcounted(inc) then
    count(inc, -1)
  end
  publish('L', cause, conn, entry .. inc .. BARE .. seq .. '\n')
end
